"""y and dx as sums of products by one kernel (csrc/cuda/hopper), where it takes them.

    y  = x W^T + s B^T + bias + residual                one sum of two products, a launch a target
    dx = sum over t of dy W + ds A + sum of m (ds A)    one launch; masked parts are written first

Taken: bf16 on a device of capability 9.0; sums of two products or more; rows that begin at
multiples of 16 bytes, so ranks that are multiples of 8; results that give every multiprocessor a
tile. Everything else is left to triton_products.py: one product with an addend cuBLAS does as well.

Rounded once; dx with masks twice, whatever the number of targets.
"""

import functools
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from modxfer_fast.kernels.common import compiled, cuda_device
from modxfer_fast.kernels.lora_linear import triton_backward, triton_products
from modxfer_fast.kernels.lora_linear.config import fills_gpu
from modxfer_fast.kernels.lora_linear.target import LoraTarget
from modxfer_fast.kernels.lora_linear.triton_launch import ranks_of
from modxfer_fast.kernels.lora_linear.triton_products import without_base

TILE = 128 * 256
MOST_PAIRS = 6
ALIGNED = 8  # elements: 16 bytes

# What is multiplied and added: left [M, L], right [N, L] for y and [L, N] for dx.
Pair = tuple[Tensor, Tensor]


def is_built() -> tuple[bool, str]:
    """Whether csrc has the kernel, and what its build lacked."""
    if hasattr(compiled.ops(), "lora_product_cuda"):
        return True, ""
    return False, (
        "large products by cuBLAS: csrc was built without nvidia-cutlass; install it as "
        "docs/install.md says, then reinstall with MODXFER_BUILD=cuda"
    )


def outputs(
    x: Tensor, targets: Sequence[LoraTarget], s: Tensor, residual: Tensor | None
) -> list[Tensor]:
    """y [M, N] of each target, as of `triton_products`."""
    parts = s.split(ranks_of(targets), dim=1)
    sums = [
        [*_base(x, target.weight), (part, target.lora_b)]
        for target, part in zip(targets, parts, strict=True)
    ]
    for pairs, target in zip(sums, targets, strict=True):
        if not _is_taken(len(target.lora_b), pairs, residual, target.bias):
            return triton_products.outputs(x, targets, s, residual)
    ys = [x.new_empty(len(x), len(target.lora_b)) for target in targets]
    for y, pairs, target in zip(ys, sums, targets, strict=True):
        sum_of_products(pairs, residual, target.bias, y, rights_in_rows=True)
    return ys


def dx(
    dys: Sequence[Tensor], targets: Sequence[LoraTarget], ds: Sequence[Tensor], masks: Sequence
) -> Tensor:
    """dx [M, K], as of `triton_products`."""
    width = targets[0].lora_a.shape[1]
    ranks = [(part, target.lora_a) for part, target in zip(ds, targets, strict=True)]
    is_first = [
        mask is not None or not _is_aligned(*pair) for pair, mask in zip(ranks, masks, strict=True)
    ]
    pairs = [pair for dy, t in zip(dys, targets, strict=True) for pair in _base(dy, t.weight)]
    pairs += [pair for pair, first in zip(ranks, is_first, strict=True) if not first]
    if not _is_taken(width, pairs):
        return triton_products.dx(dys, targets, ds, masks)
    if any(is_first):
        columns = (dys, without_base(targets), ds, masks)
        result = triton_backward.dx(*(list(itertools.compress(c, is_first)) for c in columns))
    else:
        result = dys[0].new_empty(len(dys[0]), width)
    addend = result if any(is_first) else None
    sum_of_products(pairs, addend, None, result, rights_in_rows=False)
    return result


def sum_of_products(
    pairs: Sequence[Pair],
    addend: Tensor | None,
    bias: Tensor | None,
    result: Tensor,
    *,
    rights_in_rows: bool,
) -> None:
    """result = sum of lefts times rights + addend + bias, rounded once."""
    lefts, rights = map(list, zip(*pairs, strict=True))
    with torch.cuda.device_of(result):
        compiled.ops().lora_product_cuda(
            *(lefts, rights, rights_in_rows, addend, bias, result),
            *(_multiprocessors(result.device), cuda_device.stream()),
        )


def _base(left: Tensor, weight: Tensor | None) -> list[Pair]:
    return [] if weight is None else [(left, weight)]


def _is_taken(columns: int, pairs: Sequence[Pair], *added: Tensor | None) -> bool:
    """Whether the kernel takes this sum, a result of `columns`, with `added` in its epilogue."""
    if not 2 <= len(pairs) <= MOST_PAIRS:
        return False
    left = pairs[0][0]
    rows = [tensor.reshape(-1, columns) for tensor in added if tensor is not None]
    return (
        fills_gpu(len(left), columns, TILE)
        and columns % ALIGNED == 0
        and is_hopper(left.device)
        and is_built()[0]
        and _is_aligned(*itertools.chain(*pairs), *rows)
    )


def _is_aligned(*tensors: Tensor) -> bool:
    return all(
        tensor.dtype == torch.bfloat16
        and tensor.stride(1) == 1
        and tensor.stride(0) >= tensor.shape[1] > 0
        and tensor.shape[1] % ALIGNED == tensor.stride(0) % ALIGNED == 0
        and tensor.data_ptr() % (2 * ALIGNED) == 0
        for tensor in tensors
    )


@functools.cache
def is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count

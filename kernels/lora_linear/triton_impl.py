"""LoRA linears in Triton: five kernels, each reading what is wide once.

M rows   K, N widths   R rank   T targets   m mask of x   keep = 1 / (1 - dropout)

    shrink    bits, s = scaling keep (m x) A^T          all targets, one pass over x
    expand    y = x W^T + s B^T + bias + residual       all targets, s as the last steps of the sum
              u = y P^T                                 one target, of y's tiles in registers
    ds_db     ds = scaling keep dy B, dB = dy^T s       all targets, one pass over each dy
    dx        dx = sum over t of m (ds A) + dy W        all targets, one accumulator
    da        dA = ds^T (m x)                           all targets, one pass over x

ds carries keep, which both of its uses need. Sums over rows and over tiles of columns leave as fp32
partials that a sixth kernel adds in a fixed order: no atomics, equal bits in every run. A group of
targets costs two launches forward and at most five backward, reductions included. Where products
are large a library adds those with the frozen weights (triton_products.py), a launch a target more.

Not materialised: drop(x), masks of a byte an element, x or dy in another dtype, x W^T without its
LoRA part, a dx of one target. The seed stays on the device, so a captured graph draws new masks.

Bytes beyond the frozen linears, b per element of x, one target: shrink M K (b + 1/8), ds_db
M N b + 8 M R N / BLOCK_N, dx M K / 8, da M K (b + 1/8).
"""

import functools

from torch import Tensor

from modxfer_fast.kernels.common import triton_device
from modxfer_fast.kernels.lora_linear import triton_products
from modxfer_fast.kernels.lora_linear.config import padded_rank
from modxfer_fast.kernels.lora_linear.gpu_steps import Steps, backward, dense, forward
from modxfer_fast.kernels.lora_linear.target import LoraTarget
from modxfer_fast.kernels.lora_linear.triton_backward import da, ds_db
from modxfer_fast.kernels.lora_linear.triton_expand import expand
from modxfer_fast.kernels.lora_linear.triton_launch import config_of_product, is_exact
from modxfer_fast.kernels.lora_linear.triton_reduce import reduce
from modxfer_fast.kernels.lora_linear.triton_shrink import shrink

# Columns of P whose tile fits the registers beside a tile of y.
MAX_PROJECTED = 32

available = triton_device.available
supports = triton_device.supports


STEPS = Steps(shrink, triton_products.outputs, ds_db, triton_products.dx, da, reduce)
lora_linear_fwd = functools.partial(forward, STEPS)
lora_linear_bwd = functools.partial(backward, STEPS)


def projects_in_epilogue(x: Tensor, target: LoraTarget, rank: int) -> bool:
    """Whether `lora_linear_projected_fwd` moves fewer bytes than a product that reads y again.

    Partial sums of `rank` columns, padded, are written and read, 8 bytes each a row and tile of
    columns, in place of one reading of y. fp32 without tensor cores is bound by its products, and
    so is what a library multiplies faster.
    """
    if is_exact(x) or triton_products.is_apart(x, [target], reads=2):
        return False
    config = config_of_product([x], [dense(target)], x, target.lora_b.shape[0])
    return rank <= MAX_PROJECTED and 8 * padded_rank(rank) < config.block_n * x.element_size()


def lora_linear_projected_fwd(
    x: Tensor,
    target: LoraTarget,
    seed: Tensor | None,
    projection_a: Tensor,
    *,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """`lora_linear_fwd` of one target, and u = y projection_a^T while a tile of y is in registers.

    Args:
        projection_a: [P, N], used in the dtype of x.

    Returns:
        y [M, N], s, bits, and u [M, P] in the dtype of x, summed in fp32 and rounded once.
    """
    targets = [dense(target)]
    s, bits = shrink(x, targets, seed)
    rank, width = projection_a.shape
    # to what a matrix instruction multiplies, here once instead of in every tile
    padded = x.new_zeros(padded_rank(rank), width)
    padded[:rank] = projection_a
    (y,), parts = expand(x, targets, s, residual, padded)
    assert parts is not None
    u = x.new_empty(parts.shape[1:])
    reduce([parts], [u])
    return y, s, bits, u[:, :rank]

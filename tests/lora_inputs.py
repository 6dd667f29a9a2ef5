"""Inputs of the LoRA tests, their fp64 truth, and plain PyTorch beside it.

Truth and yardstick get the mask bits of the same seed, so that dropout is compared exactly.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from modxfer_fast.kernels import dispatch
from modxfer_fast.kernels.lora_linear import LoraTarget, lora_linear_group
from modxfer_fast.kernels.lora_linear.dropout import dropout_bits, keep_scale, unpack
from modxfer_fast.kernels.lora_linear.reference import lora_linear_reference
from modxfer_fast.testing.accuracy import assert_within_budget
from tests.inputs import NAMES

PARTS = ("weight", "bias", "lora_a", "lora_b")


def _backend(name: str, dtype: torch.dtype = torch.float32):
    ok, reason = dispatch.availability("lora_linear", name)
    if ok:
        ok, reason = dispatch.load("lora_linear", name).supports("cpu", (dtype,))
    return pytest.param(name, marks=pytest.mark.skipif(not ok, reason=f"{name}: {reason}"))


NATIVE = ["reference", _backend("cpp")]
# the Triton kernels run here in Triton's interpreter, on small shapes only
BACKENDS = [*NATIVE, _backend("triton")]

# of x and of the adapters
DTYPES = [
    pytest.param((x, adapters), id="+".join(dict.fromkeys((NAMES[x], NAMES[adapters]))))
    for x, adapters in (
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    )
]
FP32, BF16, FP16, BF16_FP32, FP16_FP32 = (param.values[0] for param in DTYPES)


@dataclasses.dataclass
class LoraInputs:
    """Arguments of `lora_linear_group`, and an upstream gradient for each of its results."""

    x: Tensor  # [..., K]
    targets: list[LoraTarget]
    dys: list[Tensor]  # [..., N]
    seed: Tensor

    def leaves(self) -> dict[str, Tensor]:
        """x, weight0, bias0, lora_a0, lora_b0, weight1, ... without those that are None."""
        named = {"x": self.x}
        for index, target in enumerate(self.targets):
            named |= {f"{part}{index}": getattr(target, part) for part in PARTS}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def trainable(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in self.leaves().items() if tensor.requires_grad}

    def require(self, *names: str) -> None:
        """Exactly these parts require grad; "lora_a" is that of every target."""
        for name, tensor in self.leaves().items():
            tensor.requires_grad_(name in names or name.rstrip("0123456789") in names)

    def rows(self) -> int:
        return self.x.shape[:-1].numel()

    def masks(self) -> list[Tensor | None]:
        """[M, K] bool of each target, None without dropout."""
        width, dropouts = self.x.shape[-1], [target.dropout for target in self.targets]
        bits = dropout_bits(self.seed.reshape(()), self.rows(), width, dropouts)
        return [
            unpack(words, width) if dropout > 0.0 else None
            for words, dropout in zip(bits, dropouts, strict=True)
        ]


def lora_inputs(
    m: int | Sequence[int],
    k: int,
    widths: Sequence[int] = (40,),
    dtypes: tuple[torch.dtype, torch.dtype] = FP32,
    *,
    ranks: Sequence[int] = (8, 4, 12, 1),
    dropouts: Sequence[float] = (0.25,),
    scalings: Sequence[float] = (2.0, 0.5, -1.25),
    bias: Sequence[bool] = (True, False),
    weight: Sequence[bool] = (True,),
    size: float = 1.0,
    seed: int = 0,
) -> LoraInputs:
    """A target for each of `widths`; the other sequences are gone through in turn.

    Base and LoRA part are of one magnitude, so that neither hides the other. One column of x is an
    outlier, as in every language model, and some rows are ten times the others.
    """
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    lead = (m,) if isinstance(m, int) else tuple(m)
    dtype, adapter_dtype = dtypes
    x = size * randn(*lead, k)
    x[..., k // 2] *= 20.0
    x.view(-1, k)[::5] *= 10.0
    targets = []
    cycles = (itertools.cycle(options) for options in (ranks, dropouts, scalings, bias, weight))
    for n, rank, dropout, scaling, has_bias, has_weight in zip(widths, *cycles, strict=False):
        targets.append(
            LoraTarget(
                (randn(n, k) / math.sqrt(k)).to(dtype) if has_weight else None,
                (randn(rank, k) / math.sqrt(k)).to(adapter_dtype),
                (randn(n, rank) / math.sqrt(rank)).to(adapter_dtype),
                scaling,
                (size * randn(n)).to(dtype) if has_bias else None,
                dropout,
            )
        )
    dys = [randn(*lead, n).to(dtype) for n in widths]
    inputs = LoraInputs(x.to(dtype), targets, dys, torch.tensor(seed + 2**40 + 17))
    for tensor in inputs.leaves().values():
        tensor.requires_grad_()
    return inputs


def small_group(dtypes: tuple[torch.dtype, torch.dtype] = FP32, m=13, k=70, **options):
    """Three unlike targets: dropout beside none, a bias beside none, one base that is elsewhere."""
    options = {"dropouts": (0.5, 0.0, 0.1), "weight": (True, True, False)} | options
    return lora_inputs(m, k, (40, 23, 9), dtypes, **options)


def results_of(inputs: LoraInputs, ys: Sequence[Tensor], dys=None) -> dict[str, Tensor]:
    """y0, y1, ... and the gradient of every leaf that requires one."""
    leaves = inputs.trainable()
    named = {f"y{index}": y.detach() for index, y in enumerate(ys)}
    if not leaves:
        return named
    kept = [index for index, y in enumerate(ys) if y.requires_grad]
    dys = inputs.dys if dys is None else dys
    grads = torch.autograd.grad(
        [ys[index] for index in kept], list(leaves.values()), [dys[index] for index in kept]
    )
    return named | dict(zip(leaves, grads, strict=True))


def run(inputs: LoraInputs, dys=None, **options) -> dict[str, Tensor]:
    """`results_of` the group op."""
    options = {"seed": inputs.seed} | options
    return results_of(inputs, lora_linear_group(inputs.x, inputs.targets, **options), dys)


def check(inputs: LoraInputs, dys=None, **options) -> dict[str, Tensor]:
    """Outputs and all gradients of the group op within budget of the truth; returns them."""
    results = run(inputs, dys, **options)
    check_results(results, inputs, dys)
    return results


def check_results(results: dict[str, Tensor], inputs: LoraInputs, dys=None) -> None:
    """Each result against truth and yardstick; a result has the dtype of what it belongs to."""
    truth, plain = truth_of(inputs, dys), plain_of(inputs, dys)
    scales = _scales(inputs, truth, dys)
    leaves = inputs.leaves()
    for name, result in results.items():
        expected = leaves.get(name, inputs.x).dtype
        assert result.dtype == expected, f"{name}: {result.dtype} != {expected}"
        assert_within_budget(result, truth[name], plain[name], name, scales[name])


def truth_of(inputs: LoraInputs, dys=None) -> dict[str, Tensor]:
    """The definition in fp64, of the same rounded inputs."""
    copy = _copied(inputs, dys, lambda tensor: tensor.double())
    return results_of(
        copy, _shaped(copy, lora_linear_reference(_flat(copy), copy.targets, copy.masks()))
    )


def plain_of(inputs: LoraInputs, dys=None) -> dict[str, Tensor]:
    """PEFT's steps, each with fp32 sums and rounded to the dtype it has in PEFT."""
    copy = _copied(inputs, dys, lambda tensor: tensor)
    x = _flat(copy)
    ys = []
    for target, mask in zip(copy.targets, copy.masks(), strict=True):
        kept = x.to(target.lora_a.dtype)
        if mask is not None:
            kept = kept * mask * keep_scale(target.dropout)
        y = _linear(_linear(kept, target.lora_a), target.lora_b) * target.scaling
        if target.weight is not None:
            y = y + _linear(x, target.weight, target.bias)
        elif target.bias is not None:
            y = y + target.bias
        ys.append(y.to(x.dtype))
    return results_of(copy, _shaped(copy, ys))


def _copied(inputs: LoraInputs, dys, convert) -> LoraInputs:
    def leaf(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        return convert(tensor.detach().clone()).requires_grad_(tensor.requires_grad)

    targets = [
        target._replace(**{part: leaf(getattr(target, part)) for part in PARTS})
        for target in inputs.targets
    ]
    dys = [convert(dy.detach().clone()) for dy in (inputs.dys if dys is None else dys)]
    return LoraInputs(leaf(inputs.x), targets, dys, inputs.seed)


def _flat(inputs: LoraInputs) -> Tensor:
    return inputs.x.reshape(inputs.rows(), inputs.x.shape[-1])


def _shaped(inputs: LoraInputs, ys: Sequence[Tensor]) -> list[Tensor]:
    return [y.reshape(*inputs.x.shape[:-1], y.shape[-1]) for y in ys]


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    work = torch.promote_types(x.dtype, torch.float32)
    y = x.to(work) @ weight.to(work).T
    return (y if bias is None else y + bias.to(work)).to(x.dtype)


def _scales(inputs: LoraInputs, truth: dict[str, Tensor], dys) -> dict[str, float]:
    """The largest magnitude in each result's sums, as a multiple of the result's own rounding.

    The definition of absolute values has the sums of absolute terms as outputs and gradients; they
    are made in fp32. s and ds are rounded once to the adapters' dtype on their way.
    """
    copy = _copied(inputs, dys, lambda tensor: tensor.double().abs())
    copy.targets = [target._replace(scaling=abs(target.scaling)) for target in copy.targets]
    ys = lora_linear_reference(_flat(copy), copy.targets, copy.masks())
    summed = results_of(copy, _shaped(copy, ys))
    rounded = _through_s(inputs, dys)
    leaves, scales = inputs.leaves(), {}
    for name in truth:
        dtype = leaves.get(name, inputs.x).dtype
        accumulator = torch.promote_types(dtype, torch.float32)
        eps = torch.finfo(dtype).eps
        scale = _top(summed[name]) * torch.finfo(accumulator).eps / eps
        adapter_eps = torch.finfo(inputs.targets[0].lora_a.dtype).eps
        scales[name] = max(scale, rounded.get(name, 0.0) * adapter_eps / eps)
    return scales


def _through_s(inputs: LoraInputs, dys) -> dict[str, float]:
    """Largest sum of absolute terms in s and ds, whose own roundings reach the result."""
    x = inputs.x.detach().double().reshape(inputs.rows(), inputs.x.shape[-1])
    found, dx = {}, torch.zeros_like(x)
    for index, (target, mask) in enumerate(zip(inputs.targets, inputs.masks(), strict=True)):
        a, b = target.lora_a.detach().double(), target.lora_b.detach().double()
        dy = (inputs.dys if dys is None else dys)[index].detach().double().reshape(-1, b.shape[0])
        keep = 1.0 if mask is None else mask * keep_scale(target.dropout)
        s = (target.scaling * (x * keep) @ a.T).abs()
        ds = (target.scaling * dy @ b).abs()
        found[f"y{index}"] = _top(s @ b.abs().T)
        found[f"lora_b{index}"] = _top(dy.abs().T @ s)
        found[f"lora_a{index}"] = _top(ds.T @ (x * keep).abs())
        dx += ds @ a.abs() * keep
    return found | {"x": _top(dx)}


def _top(tensor: Tensor) -> float:
    return tensor.max().item() if tensor.numel() else 0.0

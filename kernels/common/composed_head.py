"""A head whose weight is made a tile of its classes at a time, with a LoRA beside it.

    z = hidden W^T + scaling (hidden A^T) B^T + bias

    W [V, D]   weight; or weight[ids], classes of a larger head; or dequantize(weight, *parts) of
               one that is stored in another form
    A [R, D], B [V, R]   trained, with u = hidden A^T [m, R] of a chunk of rows, du = scaling dz B:
               dhidden += du A,  dA = du^T hidden,  dB = scaling dz^T u

A dequantised weight is frozen; tiles have the dtype of the hidden states and are forgotten.
"""

import dataclasses
import itertools
import re
import weakref
from collections.abc import Callable, Iterator, Sequence, Set
from typing import Any, NamedTuple

import torch
from torch import Tensor

from modxfer_fast.kernels.common import gemm
from modxfer_fast.kernels.common.autocast import cast_for_autocast
from modxfer_fast.kernels.common.checks import (
    FLOATS,
    check_constant,
    check_float,
    check_same_device,
    check_tensor,
)
from modxfer_fast.kernels.common.chunks import ChunkPlan
from modxfer_fast.kernels.common.gathered import is_plain
from modxfer_fast.kernels.common.head import Head, HeadGradient
from modxfer_fast.kernels.common.scalars import check_number
from modxfer_fast.kernels.common.spec import KDSpec

_TILE = 4096  # classes that are made at once, at most
_quantized: "weakref.WeakValueDictionary[str, QuantizedWeight]" = weakref.WeakValueDictionary()
_names = itertools.count()


@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A frozen weight [V, D] of a head that is stored in another form, and read tile by tile.

    Example, int8 with a scale a row:
        QuantizedWeight(int8, lambda rows, scale: rows * scale[:, None], scale)

    Attributes:
        weight: [V, ...], any dtype; a class is a row.
        dequantize: from rows of weight, and the same rows of each of `parts`, to their [rows, D] in
            any float dtype. What comes out is cast to the dtype of the hidden states.
        parts: tensors [V, ...] that it needs beside them, such as scales.
    """

    weight: Tensor
    dequantize: Callable[..., Tensor]
    parts: tuple[Tensor, ...]
    name: str

    def __init__(self, weight: Tensor, dequantize: Callable[..., Tensor], *parts: Tensor):
        check_tensor("QuantizedWeight: weight", weight)
        if not callable(dequantize):
            raise TypeError(
                "QuantizedWeight: dequantize: expected a function of rows, got a "
                f"{type(dequantize).__name__}"
            )
        if weight.dim() == 0 or weight.shape[0] == 0:
            raise ValueError(
                f"QuantizedWeight: weight: expected shape [V, ...] with V > 0, "
                f"got {tuple(weight.shape)}"
            )
        for i, part in enumerate(parts):
            check_tensor(f"QuantizedWeight: parts[{i}]", part)
            if part.shape[:1] != weight.shape[:1]:
                raise ValueError(
                    f"QuantizedWeight: parts[{i}]: expected shape [{weight.shape[0]}, ...], a row "
                    f"a class, got {tuple(part.shape)}"
                )
            check_same_device(f"QuantizedWeight: parts[{i}]", part, "weight", weight)
        for i, tensor in enumerate((weight, *parts)):
            check_constant(f"QuantizedWeight: {f'parts[{i - 1}]' if i else 'weight'}", tensor)
        for field, value in (
            *(("weight", weight), ("dequantize", dequantize), ("parts", parts)),
            (
                "name",
                f"quantized_{next(_names)}",
            ),  # by which an op, whose inputs are data, finds it
        ):
            object.__setattr__(self, field, value)
        _quantized[self.name] = self

    @staticmethod
    def named(name: str) -> "QuantizedWeight":
        """Raises RuntimeError where nobody holds it any more."""
        found = _quantized.get(name)
        if found is None:
            raise RuntimeError(
                "QuantizedWeight: expected it to live as long as the losses of its heads are "
                "differentiated, but it is gone; keep a reference to it"
            )
        return found


@dataclasses.dataclass(frozen=True, eq=False)
class LoraWeight:
    """The weight of a head with a LoRA beside it, weight + scaling lora_B lora_A.

    Of PEFT's semantics, without dropout. Each of the three is trained or frozen by itself; the
    product of the two is never made.

    Attributes:
        weight: [V, D], or a `QuantizedWeight`, as what is frozen.
        lora_A: [R, D], float.
        lora_B: [V, R], float.
        scaling: number by which the product is multiplied.
    """

    weight: Tensor | QuantizedWeight
    lora_A: Tensor
    lora_B: Tensor
    scaling: float = 1.0

    @classmethod
    def of(cls, layer: Any) -> "Tensor | LoraWeight":
        """The weight of a linear that PEFT has wrapped, with its active adapters.

        Several active adapters become one of the sum of their ranks. Where adapters are disabled or
        merged it is the plain weight. The bias stays the caller's to give.

        Raises:
            TypeError: no LoRA linear of PEFT.
            ValueError: what has no such form: DoRA, dropout in training, a bias in lora_B, a base
                weight that is stored transposed.
        """
        base = getattr(layer, "base_layer", None)
        if base is None or not hasattr(layer, "lora_A") or not hasattr(layer, "lora_B"):
            raise TypeError(
                f"LoraWeight.of: expected a linear that PEFT has given a LoRA, got a "
                f"{type(layer).__name__}"
            )
        names = [name for name in layer.active_adapters if name in layer.lora_A]
        if layer.disable_adapters or layer.merged or not names:
            return base.weight

        def refuse(reason: str) -> None:
            raise ValueError(f"LoraWeight.of: {reason}")

        if getattr(layer, "fan_in_fan_out", False):
            refuse("expected a weight [V, D], got fan_in_fan_out, which stores it transposed")
        of_a, of_b = [], []
        for name in names:
            dropout = layer.lora_dropout[name]
            if getattr(dropout, "p", 0.0) > 0.0 and layer.training:
                refuse(f"expected no dropout in training, got p={dropout.p} of adapter {name!r}")
            if getattr(layer, "use_dora", {}).get(name) or name in getattr(
                layer, "lora_variant", {}
            ):
                refuse(f"expected a plain LoRA, got a variant such as DoRA of adapter {name!r}")
            if layer.lora_B[name].bias is not None:
                refuse(f"expected lora_B without a bias, got one of adapter {name!r}")
            of_a.append(layer.lora_A[name].weight)
            of_b.append(layer.lora_B[name].weight)
        scalings = [float(layer.scaling[name]) for name in names]
        if len(names) == 1:
            return cls(base.weight, of_a[0], of_b[0], scalings[0])
        scaled = [b * scaling for b, scaling in zip(of_b, scalings, strict=True)]
        return cls(base.weight, torch.cat(of_a), torch.cat(scaled, dim=1))


def quantized_in(text: str) -> list[str]:
    """The names of quantised weights among an op's inputs of kind str."""
    return re.findall(r"quantized_\d+", text)


def head_of(hidden: Tensor, weight: Any, bias: Tensor | None) -> Any:
    """The head that a user's arguments mean: a `Head`, or a `ComposedHead` where it takes one."""
    lora: tuple[Tensor | None, Tensor | None, float] = (None, None, 1.0)
    if not all(map(is_plain, (hidden, bias, *_tensors_of(weight)))):
        from modxfer_fast.kernels.common.parallel_head import local_head  # which imports this file

        return local_head(hidden, weight, bias)
    if isinstance(weight, LoraWeight):
        check_number("LoraWeight: scaling", weight.scaling)
        lora = (weight.lora_A, weight.lora_B, float(weight.scaling))
        weight = weight.weight
    elif hasattr(weight, "as_head"):
        return weight.as_head(hidden, bias)
    elif not isinstance(weight, QuantizedWeight):
        return Head(hidden, weight, bias)
    if isinstance(weight, QuantizedWeight):
        stored, parts, name = weight.weight, list(weight.parts), weight.name
    else:
        stored, parts, name = weight, [], ""
    return ComposedHead(hidden, stored, bias, lora[0], lora[1], None, parts, name, lora[2])


def of_classes(head: Any, ids: Tensor) -> "ComposedHead":
    """The head of the classes `ids` [A], int64, of a `Head` or `ComposedHead` of all of them."""
    if isinstance(head, Head):
        head = ComposedHead(*head, None, None, None, [], "", 1.0)
    return head._replace(ids=ids)


def _tensors_of(weight: Any) -> tuple[Any, ...]:
    """Those that other libraries may keep in parts."""
    if isinstance(weight, LoraWeight):
        return weight.weight, weight.lora_A, weight.lora_B
    return (weight,)


class ComposedHead(NamedTuple):
    """See above; [N, D] hidden, or [..., D] before `flat`.

    Attributes:
        ids: [V] int64, the rows of weight, bias and lora_b that are its classes; None for all.
        parts, quantized: of the `QuantizedWeight` of that name; empty without one.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    lora_a: Tensor | None
    lora_b: Tensor | None
    ids: Tensor | None
    parts: list[Tensor]
    quantized: str
    scaling: float

    @property
    def vocab_size(self) -> int:
        return self.weight.shape[0] if self.ids is None else self.ids.shape[0]

    @property
    def columns(self) -> tuple[int, int]:
        return self.vocab_size, self.vocab_size

    @property
    def row_kernel(self) -> str:
        return "kd_loss"

    @property
    def num_buffers(self) -> int:
        return 1

    @property
    def _is_whole(self) -> bool:
        """Whether weight is W, and no tile has to be made."""
        return self.ids is None and not self.quantized

    # --- a user's tensors

    def cast(self) -> "ComposedHead":
        names = ["hidden", "bias", "lora_a", "lora_b", *([] if self.quantized else ["weight"])]
        values = cast_for_autocast(*[getattr(self, name) for name in names])
        return self._replace(**dict(zip(names, values, strict=True)))

    def detach(self) -> "ComposedHead":
        bias, lora_a, lora_b = (
            None if tensor is None else tensor.detach()
            for tensor in (self.bias, self.lora_a, self.lora_b)
        )
        return self._replace(
            hidden=self.hidden.detach(),
            weight=self.weight.detach(),
            bias=bias,
            lora_a=lora_a,
            lora_b=lora_b,
        )

    def flat(self, rows: int) -> "ComposedHead":
        if self.hidden.dim() == 2:
            return self
        return self._replace(hidden=self.hidden.reshape(rows, self.hidden.shape[-1]))

    def part(self, classes: slice) -> "ComposedHead":
        if self.ids is not None:
            return self._replace(ids=self.ids[classes])
        return self._replace(
            weight=self.weight[classes],
            bias=None if self.bias is None else self.bias[classes],
            lora_b=None if self.lora_b is None else self.lora_b[classes],
            parts=[part[classes] for part in self.parts],
        )

    def check(self, role: str) -> None:
        hidden, weight, bias, lora_a, lora_b = self[:5]
        of = f"{role}_" if role else ""
        if self.quantized:
            check_float(f"{of}hidden", hidden)
            if hidden.dim() == 0:
                raise ValueError(f"{of}hidden: expected shape [..., D], got ()")
            check_same_device(f"{of}weight", weight, f"{of}hidden", hidden)
            stand_in = hidden.new_empty(1, 1).expand(weight.shape[0], hidden.shape[-1])
            Head(hidden, stand_in, bias).check(role)
        else:
            Head(hidden, weight, bias).check(role)
        if lora_a is None or lora_b is None:
            return
        for name, value in (("lora_A", lora_a), ("lora_B", lora_b)):
            check_tensor(f"{of}{name}", value)
            if value.dtype != hidden.dtype:
                raise TypeError(
                    f"{of}{name}: expected {hidden.dtype}, the dtype of {of}hidden, "
                    f"got {value.dtype}"
                )
            check_same_device(f"{of}{name}", value, f"{of}hidden", hidden)
        if lora_a.dim() != 2 or lora_a.shape[1] != hidden.shape[-1]:
            raise ValueError(
                f"{of}lora_A: expected shape [R, {hidden.shape[-1]}], got {tuple(lora_a.shape)}"
            )
        if tuple(lora_b.shape) != (weight.shape[0], lora_a.shape[0]):
            raise ValueError(
                f"{of}lora_B: expected shape {(weight.shape[0], lora_a.shape[0])}, "
                f"got {tuple(lora_b.shape)}"
            )

    def check_teacher(self, student: Any) -> None:
        stand_in = self.hidden.new_empty(1, 1).expand(self.vocab_size, 1)
        Head(self.hidden, stand_in).check_teacher(student)

    # --- a chunk of rows

    def take(self, span: slice, index: Tensor | None) -> "ComposedHead":
        rows = Head(self.hidden, self.weight).take(span, index)
        return self._replace(hidden=rows.hidden)

    def blanked(self, valid: Tensor) -> "ComposedHead":
        return self._replace(hidden=self.hidden.masked_fill(~valid[:, None], 0.0))

    def _tiles(self, most: int) -> Iterator[tuple[slice, Tensor]]:
        """Rows of W [rows, D] in the dtype of hidden, at most so many at a time."""
        most = max(min(most, _TILE), 1)
        dequantize = QuantizedWeight.named(self.quantized).dequantize if self.quantized else None
        for start in range(0, self.vocab_size, most):
            rows = slice(start, min(start + most, self.vocab_size))
            stored = [
                tensor[rows] if self.ids is None else tensor.index_select(0, self.ids[rows])
                for tensor in (self.weight, *self.parts)
            ]
            tile = stored[0] if dequantize is None else dequantize(*stored)
            shape = (rows.stop - rows.start, self.hidden.shape[1])
            if not isinstance(tile, Tensor) or tile.shape != shape or tile.dtype not in FLOATS:
                got = (
                    f"{tile.dtype} of shape {tuple(tile.shape)}"
                    if isinstance(tile, Tensor)
                    else f"a {type(tile).__name__}"
                )
                raise ValueError(
                    f"QuantizedWeight: dequantize: expected a float tensor of shape {shape} from "
                    f"{shape[0]} rows, got {got}"
                )
            yield rows, tile.to(self.hidden.dtype)

    @property
    def logit_bias(self) -> Tensor | None:
        return None if self.bias is None else self._of_ids(self.bias)

    def logits(self, out: Tensor, tile: int) -> Tensor:
        """As of `Head`."""
        out = out[: self.hidden.shape[0]]
        if self._is_whole:
            gemm.project(self.hidden, self.weight, None, out, tile)
        else:
            for classes, weight in self._tiles(tile):
                gemm.project(self.hidden, weight, None, out[:, classes], tile)
        if self.lora_b is not None:
            gemm.add_product(out, self.reduced(out.dtype), self._of_ids(self.lora_b).t())
        return out

    def reduced(self, dtype: torch.dtype) -> Tensor:
        """scaling hidden A^T, [m, R] in `dtype`."""
        assert self.lora_a is not None
        u = self.hidden.new_empty(self.hidden.shape[0], self.lora_a.shape[0], dtype=dtype)
        gemm.project(self.hidden, self.lora_a, None, u, self.lora_a.shape[0])
        return u.mul_(self.scaling)

    def _of_ids(self, tensor: Tensor) -> Tensor:
        return tensor if self.ids is None else tensor.index_select(0, self.ids)

    def signal(self, buffers: Sequence[Tensor], tile: int, spec: KDSpec) -> Tensor:
        return self.logits(buffers[0], tile)

    def dlogits(self, logits: Tensor) -> Tensor:
        """As of `Head`."""
        stand_in = self.hidden.new_empty(0, 0)
        return Head(self.hidden, stand_in).dlogits(logits)

    def dhidden(self, dlogits: Tensor, out: Tensor, tile: int) -> None:
        """out [m, D], rounded once behind both products."""
        wide = torch.promote_types(out.dtype, torch.float32)
        total = torch.zeros(out.shape, dtype=wide, device=out.device)
        if self._is_whole:
            gemm.dhidden(dlogits, self.weight, total, tile)
        else:
            for classes, weight in self._tiles(tile):
                gemm.add_product(total, dlogits[:, classes], weight)
        if self.lora_a is not None:
            gemm.add_product(total, self.dreduced(dlogits), self.lora_a)
        out.copy_(total)

    def dreduced(self, dlogits: Tensor) -> Tensor:
        """scaling dlogits B, [m, R] fp32, or fp64."""
        assert self.lora_b is not None
        wide = torch.promote_types(dlogits.dtype, torch.float32)
        du = dlogits.new_zeros(dlogits.shape[0], self.lora_b.shape[1], dtype=wide)
        gemm.add_product(du, dlogits, self._of_ids(self.lora_b))
        return du.mul_(self.scaling)

    def gradient(
        self,
        wanted: Set[str],
        row_weights: Tensor,
        plan: ChunkPlan,
        *,
        is_packed: bool,
        sums_hidden: bool = False,
    ) -> "ComposedGradient":
        return ComposedGradient(
            self, wanted, row_weights, plan, is_packed=is_packed, sums_hidden=sums_hidden
        )

    # --- bytes

    def row_bytes(self) -> int:
        return self.hidden.shape[1] * self.hidden.itemsize

    def widened_bytes(self, dtype: torch.dtype) -> int:
        """Of a row of the tiles, made and widened."""
        made = 0 if self._is_whole else self.hidden.itemsize
        widened = dtype.itemsize if gemm.is_widened(self.hidden, dtype) else 0
        return max(self.hidden.shape[1], 1) * (made + widened)

    def sum_bytes(self, wanted: Set[str], dtype: torch.dtype) -> int:
        if self.hidden.dtype == dtype:
            return 0
        names = wanted & {"weight", "lora_a", "lora_b"}
        return sum(getattr(self, name).numel() for name in names) * dtype.itemsize

    @property
    def rounds_single(self) -> bool:
        return Head(self.hidden, self.hidden).rounds_single


class ComposedGradient(HeadGradient):
    """Adds the gradients of lora_a and lora_b, summed in the dtype of the losses."""

    def __init__(
        self,
        head: ComposedHead,
        wanted: Set[str],
        row_weights: Tensor,
        plan: ChunkPlan,
        *,
        is_packed: bool,
        sums_hidden: bool = False,
    ):
        super().__init__(
            head, wanted, row_weights, plan, is_packed=is_packed, sums_hidden=sums_hidden
        )
        for name in ("lora_a", "lora_b"):
            value = getattr(head, name)
            if name in wanted and value is not None:
                self.sums[name] = torch.zeros(
                    value.shape, device=value.device, dtype=row_weights.dtype
                )

    def add(self, dlogits: Tensor, rows: ComposedHead, span: slice, index: Tensor | None) -> None:
        super().add(dlogits, rows, span, index)
        sums = self.sums
        if "lora_a" in sums:
            gemm.add_product(sums["lora_a"], rows.dreduced(dlogits).t(), rows.hidden)
        if "lora_b" in sums:
            reduced = rows.reduced(sums["lora_b"].dtype)
            if rows.ids is None:
                gemm.add_product(sums["lora_b"], dlogits.t(), reduced)
            else:
                product = torch.zeros_like(sums["lora_b"][: len(rows.ids)])
                gemm.add_product(product, dlogits.t(), reduced)
                sums["lora_b"].index_add_(0, rows.ids, product)

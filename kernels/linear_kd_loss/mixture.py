"""Several teachers of one student: a mixture of their probabilities, a sum of losses, or a route.

M teachers, their weights w [M] or [N, M]   p_m, q = softmax of a teacher's, the student's logits,
divided by the temperature

    of="probabilities"   D(p, q),  p = sum_m w_m p_m / sum_m w_m
    of="losses"          sum_m w_m D(p_m, q)
    route                D(p_r, q), r the teacher that the token names

Logits [m, V] of one teacher at a time exist for a chunk of rows. A sum of losses is a pass of the
row kernel over the chunk for each teacher, and one for the cross entropy where there is one.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from modxfer_fast.kernels import env
from modxfer_fast.kernels.common import (
    Bend,
    KDSpec,
    check_constant,
    check_number,
    check_same_device,
    check_tensor,
    packing,
)
from modxfer_fast.kernels.common.composed_head import (
    ComposedHead,
    LoraWeight,
    QuantizedWeight,
    head_of,
)
from modxfer_fast.kernels.common.head import Head
from modxfer_fast.kernels.common.parallel_head import ParallelHead
from modxfer_fast.kernels.common.shard import Shard
from modxfer_fast.kernels.kd_loss import stages, topk_stages
from modxfer_fast.kernels.kd_loss.topk import TeacherTopK
from modxfer_fast.kernels.linear_kd_loss.teachers import Teacher, Values

OF = ("probabilities", "losses")
# kinds that a mixture is made of, by the name under which they cross the op's boundary
_DENSE: dict[str, Any] = {kind.__name__: kind for kind in (Head, ComposedHead, Values)}


@dataclasses.dataclass(frozen=True, eq=False)
class TeacherHead:
    """Hidden states and a head as one of several teachers.

    Attributes:
        hidden, weight, bias: as teacher_hidden, teacher_weight, teacher_bias of `linear_kd_loss`.
        logit_scale, softcap: what its model does to its logits, as teacher_logit_scale and
            teacher_softcap.
    """

    hidden: Tensor
    weight: Tensor | LoraWeight | QuantizedWeight
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None

    @property
    def bend(self) -> Bend:
        return Bend(self.logit_scale, self.softcap)

    def kind(self) -> Any:
        return head_of(self.hidden, self.weight, self.bias)


@dataclasses.dataclass(frozen=True, eq=False)
class TeacherMixture:
    """Several teachers of one student, which may differ in width, dtype and kind.

    Attributes:
        teachers: `TeacherHead`, `TeacherLogits`, `TeacherLogProbs` or `TeacherProbs`.
        weights: one number a teacher, or a tensor [M], or [..., M] for weights of each token; not
            negative. None: 1/M each. A mixture divides them by their sum; a sum of losses takes
            them as they are.
        of: "probabilities" for the loss of the mixture sum w_m p_m, at the loss's temperature;
            "losses" for the sum of the losses, w_m D(p_m, q).
        route: [...] int64, the teacher of each token in [0, M), in place of weights. On a CPU each
            teacher's head meets its tokens alone; a GPU, which would have to wait for their number,
            runs all of them.
    """

    teachers: Sequence[Any]
    weights: Sequence[float] | Tensor | None = None
    of: str = "probabilities"
    route: Tensor | None = None

    def kind(self) -> "Mixture":
        """Raises ValueError or TypeError that names the attribute."""
        if self.of not in OF:
            raise ValueError(
                f"TeacherMixture: of: expected one of {', '.join(OF)}, got {self.of!r}"
            )
        teachers = [each.kind() if hasattr(each, "kind") else each for each in self.teachers]
        if not teachers:
            raise ValueError("TeacherMixture: teachers: expected at least one, got none")
        for i, (given, each) in enumerate(zip(self.teachers, teachers, strict=True)):
            if type(each) not in _DENSE.values():
                of_part = " of a VocabParallelWeight" if type(each) is ParallelHead else ""
                raise TypeError(
                    f"TeacherMixture: teachers[{i}]: expected a TeacherHead of a whole weight, "
                    f"TeacherLogits, TeacherLogProbs or TeacherProbs, got a "
                    f"{type(given).__name__}{of_part}"
                )
        fixed, weights = self._weights(len(teachers))
        bends: list[float] = []
        for i, given in enumerate(self.teachers):
            bend = getattr(given, "bend", Bend())
            bend.check(f"TeacherMixture: teachers[{i}]")
            bends += bend.numbers()
        of = self.of
        if self.route is not None:
            check_tensor("TeacherMixture: route", self.route)
            if self.weights is not None:
                raise ValueError("TeacherMixture: weights: expected None beside route, got both")
            if self.route.dtype != torch.int64:
                raise TypeError(
                    f"TeacherMixture: route: expected torch.int64, got {self.route.dtype}"
                )
            of, weights = "route", self.route[..., None]
        return Mixture(*_packed(teachers), fixed, bends, weights, of, "", [])

    def _weights(self, count: int) -> tuple[list[float], Tensor | None]:
        """Numbers, and a tensor [..., M] where the weights are one."""
        weights = self.weights
        if weights is None:
            return [1.0 / count] * count, None
        if isinstance(weights, Tensor):
            check_constant("TeacherMixture: weights", weights)
            if weights.dim() == 0 or weights.shape[-1] != count or not weights.is_floating_point():
                raise ValueError(
                    f"TeacherMixture: weights: expected floats of shape [{count}] or "
                    f"[..., {count}], one a teacher, got {weights.dtype} of shape "
                    f"{tuple(weights.shape)}"
                )
            return [], weights
        if len(weights) != count:
            raise ValueError(
                f"TeacherMixture: weights: expected {count}, one a teacher, got {len(weights)}"
            )
        for i, weight in enumerate(weights):
            check_number(f"TeacherMixture: weights[{i}]", weight)
            if not 0.0 <= weight < math.inf:
                raise ValueError(
                    f"TeacherMixture: weights[{i}]: expected a number that is not negative, "
                    f"got {weight}"
                )
        if sum(weights) == 0.0 and self.of == "probabilities":
            raise ValueError("TeacherMixture: weights: expected a positive sum, got 0")
        return [float(weight) for weight in weights], None


class Mixture(NamedTuple):
    """The teachers as one kind; see `TeacherMixture`.

    Attributes:
        tensors: of all teachers, one after the other.
        layout: which kinds they are, and which of their fields the tensors are.
        numbers: [M] weights, where they are the same for all rows; else empty.
        bends: [2 M], `Bend.numbers` of each teacher.
        weights: [N, M] weights or, for "route", [N, 1] int64; [..., M] before `flat`. A tensor [M]
            serves all rows.
        of: "probabilities", "losses" or "route".
        group, sizes: of the `Shard` whose part of the classes this is; none where it has all.
    """

    tensors: list[Tensor]
    layout: str
    numbers: list[float]
    bends: list[float]
    weights: Tensor | None
    of: str
    group: str
    sizes: list[int]

    @property
    def teachers(self) -> list[Any]:
        tensors = list(self.tensors)
        made = []
        for codes in self.layout.split(";"):
            name, *fields = codes.split(",")
            made.append(_DENSE[name]._make([_decoded(code, tensors) for code in fields]))
        return made

    def of_teachers(self, teachers: Sequence[Any]) -> "Mixture":
        """The mixture of others, as many."""
        return self._with(teachers, self.weights)

    def _with(self, teachers: Sequence[Any], weights: Tensor | None) -> "Mixture":
        tensors, layout = _packed(teachers)
        return self._replace(tensors=tensors, layout=layout, weights=weights)

    @property
    def vocab_size(self) -> int:
        """Of all; that of the first which has another than the first, so that it is seen."""
        sizes = [teacher.vocab_size for teacher in self.teachers]
        return next((size for size in sizes if size != sizes[0]), sizes[0])

    @property
    def row_kernel(self) -> str:
        return "kd_loss"

    @property
    def num_buffers(self) -> int:
        """The mixture or the sum of gradients, what comes next, and one teacher's logits."""
        return 2 if self.of == "route" else 3

    def detach(self) -> "Mixture":
        weights = None if self.weights is None else self.weights.detach()
        return self._replace(tensors=[tensor.detach() for tensor in self.tensors], weights=weights)

    def cast(self) -> "Mixture":
        return self._with([teacher.cast() for teacher in self.teachers], self.weights)

    def check(self, role: str) -> None:
        for i, teacher in enumerate(self.teachers):
            teacher.check(f"{role}s[{i}]")

    def check_teacher(self, student: Any) -> None:
        for teacher in self.teachers:
            teacher.check_teacher(student)
        lead, weights = tuple(student.hidden.shape[:-1]), self.weights
        if weights is None:
            return
        name = "route" if self.of == "route" else "weights"
        check_same_device(f"TeacherMixture: {name}", weights, "student_hidden", student.hidden)
        got = tuple(weights.shape[:-1])
        if got != lead and (weights.dim() > 1 or self.of == "route"):
            raise ValueError(
                f"TeacherMixture: {name}: expected the leading dimensions of student_hidden, "
                f"{lead}, got {got}"
            )

    def flat(self, rows: int) -> "Mixture":
        weights = self.weights
        if weights is not None:
            if weights.dim() == 1 and self.of != "route":
                weights = weights.expand(rows, -1)
            weights = weights.reshape(rows, weights.shape[-1])
        return self._with([teacher.flat(rows) for teacher in self.teachers], weights)

    def part(self, classes: slice) -> "Mixture":
        return self._with([each.part(classes) for each in self.teachers], self.weights)

    def part_of(self, shard: Shard) -> "Mixture":
        """Of this rank's classes."""
        return self.part(shard.span)._replace(group=shard.group, sizes=shard.sizes)

    def take(self, span: slice, index: Tensor | None) -> "Mixture":
        weights = self.weights
        if weights is not None:
            weights = packing.take(weights, span, index)
        return self._with([teacher.take(span, index) for teacher in self.teachers], weights)

    def signal(self, buffers: Sequence[Tensor], tile: int, spec: KDSpec) -> Any:
        """Logits; or `Losses` for a sum of them."""
        if self.of == "route":
            return self._routed(buffers, tile, spec)
        if self.of == "losses":
            signals = (
                self._signal(i, teacher, buffers[2:], tile, spec)
                for i, teacher in enumerate(self.teachers)
            )
            return Losses(signals, self._columns(), buffers[0], buffers[1])
        return self._mixed(buffers, tile, spec)

    def _signal(
        self, i: int, teacher: Any, buffers: Sequence[Tensor], tile: int, spec: KDSpec
    ) -> Tensor:
        """The logits of rows of teacher i, as its model gives them."""
        scale, cap = self.bends[2 * i : 2 * i + 2]
        # values are bent already, and may be a user's
        bend = Bend(scale, cap or None, getattr(teacher, "logit_bias", None))
        return bend.apply(teacher.signal(buffers, tile, spec))

    def _mixed(self, buffers: Sequence[Tensor], tile: int, spec: KDSpec) -> Tensor:
        """Logarithms of the mixture, times the temperature by which the row kernel divides."""
        first = None
        for i, (weight, teacher) in enumerate(zip(self._columns(), self.teachers, strict=True)):
            logits = self._signal(i, teacher, buffers[2:], tile, spec)
            total, log_p, scaled = (buffer[: logits.shape[0]] for buffer in buffers)
            if first is None:
                log_p = total
            scaled.copy_(logits)  # the same memory for a head
            self._log_softmax(scaled.div_(spec.temperatures), log_p)
            # in logarithms: a probability below the smallest number must not become 0
            log_p += weight.to(log_p).log() if isinstance(weight, Tensor) else _log(weight)
            first = log_p if first is None else torch.logaddexp(first, log_p, out=first)
        assert first is not None
        return first.mul_(spec.temperatures)

    def _log_softmax(self, z: Tensor, out: Tensor) -> None:
        """Over the classes of all ranks."""
        if not self.sizes:
            torch.log_softmax(z, -1, out=out)
            return
        of_ranks = Shard(self.group, self.sizes).gather(z.logsumexp(-1))
        torch.sub(z, of_ranks.logsumexp(0)[:, None], out=out)

    def _routed(self, buffers: Sequence[Tensor], tile: int, spec: KDSpec) -> Tensor:
        assert self.weights is not None
        route = self.weights[:, 0]
        out = buffers[0][: route.shape[0]]
        for i, teacher in enumerate(self.teachers):
            chosen = route == i
            if route.is_cuda:
                signal = self._signal(i, teacher, buffers[1:], tile, spec)
                torch.where(chosen[:, None], signal.to(out.dtype), out, out=out)
                continue
            index = chosen.nonzero().squeeze(1)
            if index.numel():
                rows = teacher.take(slice(0, 0), index)
                signal = self._signal(i, rows, buffers[1:], tile, spec)
                out.index_copy_(0, index, signal.to(out.dtype))
        return out

    def _columns(self) -> list[Any]:
        """The weight of each teacher: a number, or [m, 1]."""
        return self.numbers if self.weights is None else list(self.weights.split(1, dim=1))

    def check_values(self, spec: KDSpec, valid: Tensor | None, vocab_size: int) -> None:
        """Raises ValueError for values of rows that count; those on a GPU under MODXFER_DEBUG=1
        alone."""
        for teacher in self.teachers:
            if isinstance(teacher, Values):
                teacher.check_values(spec, valid, vocab_size)
        weights = self.weights
        if weights is None or not (weights.device.type == "cpu" or env.debug()):
            return
        weights = weights if valid is None else weights[valid]
        if self.of == "route":
            count = len(self.teachers)
            bad, expected = (weights < 0) | (weights >= count), f"values in [0, {count})"
            name = "route"
        else:
            bad, expected, name = ~(weights >= 0), "numbers that are not negative", "weights"
        if bad.any():
            raise ValueError(
                f"TeacherMixture: {name}: expected {expected}, got {weights[bad][0].item()}"
            )
        if self.of == "probabilities" and (weights.sum(-1) == 0).any():
            raise ValueError("TeacherMixture: weights: expected a positive sum a token, got 0")

    def row_bytes(self) -> int:
        return sum(teacher.row_bytes() for teacher in self.teachers)

    def widened_bytes(self, dtype: torch.dtype) -> int:
        return max(teacher.widened_bytes(dtype) for teacher in self.teachers)


class Losses(NamedTuple):
    """The signal of a sum of losses.

    Attributes:
        signals: each teacher's, made when it is asked for.
        weights: as many, numbers or [m, 1].
        total, part: buffers [.., V] for the sum of gradients and for one of them.
    """

    signals: Iterator[Tensor]
    weights: list[Any]
    total: Tensor
    part: Tensor


def refuse_without_logits(teacher: Any, spec: KDSpec) -> None:
    """Raises ValueError for a divergence of logits beside a teacher that does not give them."""
    if not spec.is_of_logits:
        return
    kinds = teacher.teachers if isinstance(teacher, Mixture) else [teacher]
    known = [getattr(kind, "holds", "logits") for kind in kinds]
    if isinstance(teacher, Mixture) and teacher.of == "probabilities":
        known.append("a mixture of probabilities")
    for holds in known:
        if holds != "logits":
            raise ValueError(
                f"divergence: expected one of probabilities beside a teacher that is given by "
                f"{holds}, whose logits are not known, got {spec.record.name!r}"
            )


def row_function(
    kernels: ModuleType, student: Any, teacher: Teacher, suffix: str
) -> Callable[..., Any]:
    """The function of `kernels` that reads these two; suffix is "fwd" or "fwd_bwd"."""
    function: Callable[..., Any]
    if isinstance(student, ParallelHead):
        room = topk_stages if isinstance(teacher, TeacherTopK) else stages
        name = "topk_kd_loss" if isinstance(teacher, TeacherTopK) else "kd_loss"
        function = functools.partial(getattr(room, f"{name}_{suffix}"), kernels, student.shard)
    else:
        function = getattr(kernels, f"{teacher.row_kernel}_{suffix}")
    if isinstance(teacher, Mixture) and teacher.of == "losses":
        return functools.partial(_sum_fwd if suffix == "fwd" else _sum_fwd_bwd, function)
    return function


def _sum_fwd(function, logits, losses: Losses, labels, spec: KDSpec, *extras):
    total, ce = None, None
    for weight, signal in zip(losses.weights, losses.signals, strict=True):
        kd, ce_rows, _ = function(logits, signal, labels, spec, *extras)
        ce = ce_rows if ce is None else ce
        total = _plus(total, kd, weight)
    return total, ce, None


def _sum_fwd_bwd(
    function, logits, losses: Losses, labels, row_weights, spec: KDSpec, dlogits, *extras
):
    """As a row kernel. The sum of gradients is made aside: each call reads the student's logits."""
    of_teachers = dataclasses.replace(spec, ce_weight=0.0, z_loss_weight=0.0)
    # beside the student itself, whose divergence is 0
    of_labels = dataclasses.replace(spec, kd_weight=0.0, teacher_bias=spec.student_bias)
    dtotal, dpart = losses.total[: logits.shape[0]], losses.part[: logits.shape[0]]
    dtotal.zero_()
    total = None
    ce = torch.zeros_like(row_weights)
    for weight, signal in zip(losses.weights, losses.signals, strict=True):
        factor = weight if isinstance(weight, float) else weight[:, 0].to(row_weights.dtype)
        weighted = torch.where(row_weights != 0, row_weights * factor, 0.0)
        kd, _ = function(logits, signal, None, weighted, of_teachers, dpart)
        dtotal += dpart
        total = _plus(total, kd, weight)
    if spec.ce_weight != 0.0 or spec.z_loss_weight != 0.0:
        _, ce = function(logits, logits, labels, row_weights, of_labels, dpart, *extras)
        dtotal += dpart
    dlogits.copy_(dtotal)
    return total, ce


def _plus(total: Tensor | None, kd: Tensor, weight: Any) -> Tensor:
    """A teacher without weight has no part, whatever its divergence."""
    if isinstance(weight, float):
        part = kd * weight if weight else torch.zeros_like(kd)
    else:
        weight = weight[:, 0].to(kd.dtype)
        part = torch.where(weight != 0, kd * weight, 0.0)
    return part if total is None else total + part


def _log(weight: float) -> float:
    return math.log(weight) if weight else -math.inf


def _packed(teachers: Sequence[Any]) -> tuple[list[Tensor], str]:
    """Tensors and layout of a `Mixture`."""
    tensors: list[Tensor] = []
    layout = []
    for teacher in teachers:
        codes = [type(teacher).__name__]
        for field in teacher:
            code, found = _coded(field)
            codes.append(code)
            tensors += found
        layout.append(",".join(codes))
    return tensors, ";".join(layout)


def _coded(field: Any) -> tuple[str, list[Tensor]]:
    """One field of a teacher as a word of the layout, and the tensors that it holds."""
    if isinstance(field, Tensor):
        return "t", [field]
    if isinstance(field, list):
        return f"l{len(field)}", field
    if isinstance(field, float):
        return f"f{field!r}", []
    return ("n", []) if field is None else (f"s{field}", [])


def _decoded(code: str, tensors: list[Tensor]) -> Any:
    """The field of this word; takes its tensors from the front of the list."""
    kind, rest = code[0], code[1:]
    if kind == "t":
        return tensors.pop(0)
    if kind == "l":
        return [tensors.pop(0) for _ in range(int(rest))]
    if kind == "f":
        return float(rest)
    return None if kind == "n" else rest

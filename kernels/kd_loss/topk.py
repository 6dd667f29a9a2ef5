"""Teachers of which K classes a row are known: what a server, an API or a cache of logits gives.

N rows   K classes listed   V classes   A the listed ids of a row   p teacher   q student

    bucket       the classes that are not listed are one more, with the rest of the mass on either
                 side: p_tail = 1 - sum_A p, q_tail = the sum of q over them. The divergence of
                 K + 1 classes; never negative, 0 where student and teacher agree on all of them
    renormalise  p over the listed classes is divided by its sum, the others have p = 0; the student
                 keeps its softmax over V. DistillKit's "zero" for the missing mass
    none         the addends of the listed classes, p as it is, and nothing for the rest. What verl
                 and VeOmni sum; may be negative

In the student's logits, with f, u of kernels/divergences.py for p, q of a class and U = sum u:

    listed       dD/dz_i = (u_i - q_i U) / temperature
    not listed   dD/dz_j = (q_j / q_tail u_tail - q_j U) / temperature     bucket
                 dD/dz_j = (u(0, q_j) - q_j U) / temperature               renormalise
                 dD/dz_j = -q_j U / temperature                            none

Where classes without p have one addend together, "renormalise" is a bucket without p, and takes no
pass over the others. So it is of a divergence that is a function of sums over the row, which is
that of the K + 1 classes; "none" has nothing to leave out of it.

The u of a record may lack a multiple c q of q, of which the gradient of a whole distribution does
not depend. That of "none", whose sum has no whole, does: there u + c q takes its place.

No teacher is [N, V] anywhere; q_tail is a sum over the classes that are not listed, not 1 minus one
over those that are, which would be noise where a student is sure.
"""

import dataclasses
import difflib
import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from modxfer_fast.kernels import env
from modxfer_fast.kernels.common import Bend, KDSpec, packing
from modxfer_fast.kernels.common.checks import (
    check_constant,
    check_float,
    check_row_tensor,
    check_same_device,
    check_tensor,
)
from modxfer_fast.kernels.common.scalars import check_number, is_finite
from modxfer_fast.kernels.common.shard import Shard
from modxfer_fast.kernels.kd_loss import stages
from modxfer_fast.kernels.names import TAILS

# What a sum of probabilities, or a logarithm, may exceed its bound by: rounding to four decimals.
ROUNDING = 1e-4
_COLUMNS = 4096  # whose logits are made at once


def check_listed(
    kernels: ModuleType, count: int, classes: int, device: torch.device, *, finds: bool = False
) -> None:
    """Raises BackendError for lists that the row kernels of a backend have no room for.

    Backends without such a bound have no `check_listed`; arguments as of that of `cuda_impl`.
    """
    if hasattr(kernels, "check_listed"):
        kernels.check_listed(finds, count, classes, device)


class TopKRows(NamedTuple):
    """What the row kernels `topk_kd_loss` read of a teacher.

    Attributes:
        ids: [M, K], int64 or int32; what lies outside [0, V) is absent. No id twice in a row.
        log_probs: [M, K], fp32 or fp64, at the loss's temperature and, for "renormalise", of sum 1.
        log_tail: [M], its dtype: the logarithm of the mass that is not listed; of "bucket".
        tail: one of `TAILS`.
        missing: c of the record's u; of "none", and 0 otherwise.
    """

    ids: Tensor
    log_probs: Tensor
    log_tail: Tensor | None
    tail: str
    missing: float = 0.0


class TeacherTopK(NamedTuple):
    """A teacher that tells its K likeliest classes, or any others, and their log-probabilities.

    Attributes:
        ids: [..., K], int64 or int32, classes of the student's vocabulary, none twice in a row. -1
            is absent, for rows with fewer than K, whatever log_probs holds there.
        log_probs: [..., K], any float, of the teacher's softmax over its whole vocabulary: their
            probabilities sum to 1 at most. A constant.
        tail: what becomes of the classes that are not listed: "bucket", "renormalise" or "none",
            as the head of kernels/kd_loss/topk.py says.
        temperature: at which the teacher's softmax was taken; None for that of the loss, be it one
            of each token. A loss at another one can be had with tail "renormalise" alone, which
            needs no more than the listed classes, p_i^(temperature / temperature of the loss) over
            their sum; the rest of the mass cannot be softened without the logits that it is made
            of.
        log_tail: [...], any float, the logarithm of the mass that is not listed, for "bucket", as
            `teacher_topk` finds it. None: that of 1 - sum p, which is no more exact than log_probs
            are: of half precision, or where little is left, it is noise.
    """

    ids: Tensor
    log_probs: Tensor
    tail: str = "bucket"
    temperature: float | None = 1.0
    log_tail: Tensor | None = None

    @property
    def row_kernel(self) -> str:
        return "topk_kd_loss"

    @property
    def num_buffers(self) -> int:
        return 0

    # --- a user's tensors

    def detach(self) -> "TeacherTopK":
        return self._each(Tensor.detach)

    def cast(self) -> "TeacherTopK":
        return self

    def beside(self, dtype: torch.dtype) -> "TeacherTopK":
        """Of fp64 only beside a student of it: lists from NumPy are, and row kernels take fp32."""
        if self.log_probs.dtype != torch.float64 or dtype == torch.float64:
            return self
        return self._each(lambda tensor: tensor.float() if tensor.is_floating_point() else tensor)

    def check(self, role: str = "teacher") -> None:
        """Raises ValueError or TypeError that names `<role>_ids`, `_log_probs` or another field."""
        ids, log_probs, tail, temperature, log_tail = self
        check_tensor(f"{role}_ids", ids)
        if ids.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{role}_ids: expected torch.int64 or torch.int32, got {ids.dtype}")
        if ids.dim() == 0 or ids.shape[-1] == 0:
            raise ValueError(
                f"{role}_ids: expected shape [..., K] with K > 0, got {tuple(ids.shape)}"
            )
        check_float(f"{role}_log_probs", log_probs)
        check_constant(f"{role}_log_probs", log_probs)
        if log_probs.shape != ids.shape:
            raise ValueError(
                f"{role}_log_probs: expected the shape of {role}_ids, {tuple(ids.shape)}, "
                f"got {tuple(log_probs.shape)}"
            )
        check_same_device(f"{role}_log_probs", log_probs, f"{role}_ids", ids)
        if log_tail is not None:
            check_float(f"{role}_log_tail", log_tail)
            lead = tuple(ids.shape[:-1])
            check_row_tensor(f"{role}_log_tail", log_tail, lead, f"{role}_ids", ids)
        if tail not in TAILS:
            near = difflib.get_close_matches(str(tail), TAILS, n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"tail: expected one of {', '.join(TAILS)}, got {tail!r}{hint}")
        if temperature is None:  # that of the loss
            return
        check_number(f"{role}_temperature", temperature)
        if not (temperature > 0.0 and is_finite(temperature)):
            raise ValueError(f"{role}_temperature: expected a positive number, got {temperature}")

    def check_teacher(self, student: Any) -> None:
        """Raises ValueError where it cannot teach the rows of this head."""
        self.check_rows("student_hidden", student.hidden)

    def check_rows(self, name: str, like: Tensor) -> None:
        """Raises ValueError beside rows `like` [..., D], the argument `name`."""
        lead = like.shape[:-1]
        if self.ids.shape[:-1] != lead:
            raise ValueError(
                f"teacher_ids: expected the leading dimensions of {name}, {tuple(lead)}, "
                f"got {tuple(self.ids.shape[:-1])}"
            )
        check_same_device("teacher_ids", self.ids, name, like)

    def check_values(self, spec: KDSpec, valid: Tensor | None, vocab_size: int) -> None:
        """Raises ValueError for a loss that this teacher does not suit, or for values [N, K] that
        are no teacher's; those on a GPU under MODXFER_DEBUG=1 alone.

        Args:
            valid: [N] bool, rows that count; the others may hold anything.
        """
        self._check_spec(spec)
        ids, log_probs = self.ids, self.log_probs
        if ids.numel() == 0 or not (ids.device.type == "cpu" or env.debug()):
            return
        log_tail = self.log_tail
        if valid is not None:
            ids, log_probs = ids[valid], log_probs[valid]
            log_tail = None if log_tail is None else log_tail[valid]
        bad = (ids < -1) | (ids >= vocab_size)
        if bad.any():
            raise ValueError(
                f"teacher_ids: expected values in [0, {vocab_size}), or -1 for none, "
                f"got {ids[bad][0].item()}"
            )
        ordered = ids.sort(-1).values
        twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
        if twice.any():
            raise ValueError(
                f"teacher_ids: expected no class twice in a row of them, "
                f"got {ordered[:, 1:][twice][0].item()} twice"
            )
        log_p = log_probs.double().masked_fill(ids < 0, -torch.inf)
        if (log_p > ROUNDING).any():
            raise ValueError(
                f"teacher_log_probs: expected logarithms of probabilities, at most 0, "
                f"got {log_p[log_p > ROUNDING][0].item():.6g}"
            )
        if self.tail == "renormalise":
            if not (ids >= 0).any(-1).all():
                raise ValueError(
                    "teacher_ids: expected a class in every row that counts, with tail "
                    "'renormalise', got a row of -1 alone"
                )
            return
        p = log_p.exp()
        # each probability is as uncertain as its logarithm, times itself
        entropy = -(p * log_p.clamp(min=-1e3)).sum(-1)
        rounding = torch.finfo(log_probs.dtype).eps * (1.0 + entropy)
        excess = p.sum(-1) - 1.0
        beside = ""
        if log_tail is not None and self.tail == "bucket":
            excess, beside = excess + log_tail.double().exp(), " with the mass of log_tail"
        if (excess > rounding + ROUNDING).any():
            raise ValueError(
                f"teacher_log_probs: expected probabilities whose sum{beside} is at most 1 in "
                f"every row, got {1.0 + excess[excess > ROUNDING].max().item():.6g}; "
                f"log-probabilities are those of the softmax over the whole vocabulary, or "
                f"tail='renormalise'"
            )

    def _check_spec(self, spec: KDSpec) -> None:
        of_loss = "one a token" if spec.softening is not None else spec.temperature
        if self.tail != "renormalise" and self.temperature not in (None, of_loss):
            own = spec.temperature if spec.softening is None else None
            raise ValueError(
                f"temperature: expected {self.temperature}, that of the teacher's log_probs, with "
                f"tail {self.tail!r}, because the mass of classes that are not listed cannot be "
                f"softened, got {of_loss}; take log_probs at that temperature and say so, "
                f"TeacherTopK(..., temperature={own}), or tail='renormalise'"
            )
        divergence = spec.record
        if spec.is_of_logits:
            raise ValueError(
                f"divergence: expected one of probabilities beside a TeacherTopK, whose logits are "
                f"not known, got {divergence.name!r}"
            )
        if divergence.whole is not None:
            if self.tail == "none":
                raise ValueError(
                    f"divergence: expected a sum over the classes, with tail 'none', which leaves "
                    f"addends out of it, got {divergence.name!r}, {divergence.formula}; the other "
                    f"tails have it"
                )
        elif self.tail == "renormalise" and not math.isfinite(_of_one_class(spec, 0.0, 0.5)[0]):
            raise ValueError(
                f"divergence: expected one that is finite where the teacher gives a class nothing, "
                f"with tail 'renormalise', got {divergence.name!r}, {divergence.formula}; "
                f"tail='bucket' gives the classes that are not listed what mass is left"
            )

    def flat(self, rows: int) -> "TeacherTopK":
        lead = self.ids.dim() - 1
        return self._each(lambda tensor: tensor.reshape(rows, *tensor.shape[lead:]))

    # --- of [N, K]

    def take(self, span: slice, index: Tensor | None) -> "TeacherTopK":
        return self._each(lambda tensor: packing.take(tensor, span, index))

    def signal(self, buffers: Sequence[Tensor], tile: int, spec: KDSpec) -> TopKRows:
        return self.rows(spec)

    def rows(self, spec: KDSpec) -> TopKRows:
        """What the row kernels read, of [M, K] and a loss that `check_values` has passed."""
        absent = self.ids < 0
        log_p = self.log_probs.double().masked_fill(absent, -torch.inf)
        dtype = torch.promote_types(self.log_probs.dtype, torch.float32)
        if self.tail == "renormalise":
            if self.temperature is not None:
                log_p = log_p * (self.temperature / spec.temperatures)
            log_p = log_p - log_p.logsumexp(-1, keepdim=True)
            if spec.record.joins:  # the classes that are not listed, which have no p
                nothing = torch.full_like(log_p[:, 0], -torch.inf)
                return TopKRows(self.ids, log_p.to(dtype), nothing.to(dtype), "bucket")
            return TopKRows(self.ids, log_p.to(dtype), None, self.tail)
        log_p = log_p.clamp(max=0.0)
        log_tail = None
        if self.tail == "bucket" and self.log_tail is not None:
            least = math.log(torch.finfo(dtype).tiny)  # infinitely unlikely would be as below
            log_tail = self.log_tail.clamp(least, 0.0).to(dtype)
        elif self.tail == "bucket":
            log_tail = log_mass_beside(log_p, dtype)
        missing = _missing(spec) if self.tail == "none" else 0.0
        return TopKRows(self.ids, log_p.to(dtype), log_tail, self.tail, missing)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "TeacherTopK":
        """With every tensor changed."""
        return TeacherTopK._make(
            [change(field) if isinstance(field, Tensor) else field for field in self]
        )

    # --- bytes

    def row_bytes(self) -> int:
        return self.ids.shape[-1] * (self.ids.itemsize + 2 * torch.float64.itemsize)

    def widened_bytes(self, dtype: torch.dtype) -> int:
        return 0


def log_mass_beside(log_probs: Tensor, dtype: torch.dtype) -> Tensor:
    """[...], log(1 - sum p) of log_probs [..., K] in fp64, -inf for absent ones.

    The sum may be next to 0 or 1; a softmax in fp32 says 1 of all above 1 - 6e-8, and a tail of
    nothing would be infinitely unlikely.
    """
    mass = -log_probs.logsumexp(-1).expm1()
    return mass.clamp(min=torch.finfo(dtype).eps / 2).log().to(dtype)


def _of_one_class(spec: KDSpec, p: float, q: float) -> tuple[float, float]:
    """f and u of a class."""
    of_p, of_q = torch.tensor([[p], [q]], dtype=torch.float64).unbind()
    f, u = spec.record.of_classes(of_p.log(), of_q.log(), *spec.parameters)
    return f.item(), u.item()


def _missing(spec: KDSpec) -> float:
    """c of q dD/dq = u + c q, by a difference quotient of f, which is smooth where p is not q."""
    p, q, step = 0.3, 0.5, 1e-5
    above, below = (_of_one_class(spec, p, q + sign * step)[0] for sign in (1, -1))
    slope = (above - below) / (2 * step)
    return round(slope - _of_one_class(spec, p, q)[1] / q, 9)  # what a quotient is good for


def list_terms(
    teacher: TopKRows,
    listed: Tensor,
    log_q: Tensor,
    log_q_tail: Tensor,
    classes: int,
    spec: KDSpec,
) -> tuple[Tensor, Tensor, Tensor]:
    """The divergence [M] of the K classes, or of K + 1 with a tail, and u and q of each.

    Args:
        listed: [M, K] bool, ids that are there; those that are not have a log_q of -inf.
        log_q: [M, K]. log_q_tail: [M, 1], of the classes that are not listed.
        classes: of the whole row.
    """
    log_p = teacher.log_probs.to(log_q.dtype).masked_fill(~listed, -torch.inf)
    if teacher.log_tail is not None:
        log_p_tail = teacher.log_tail[:, None].to(log_q.dtype)
        # nothing of the student's is left, and of the teacher's no more than rounding
        is_full = listed.sum(-1, keepdim=True) == classes
        is_gone = (log_q_tail == -torch.inf) & (is_full | (log_p_tail < math.log(ROUNDING)))
        log_q = torch.cat([log_q, log_q_tail], dim=-1)
        log_p = torch.cat([log_p, log_p_tail.masked_fill(is_gone, -torch.inf)], dim=-1)
    q = log_q.exp()
    kd, u = spec.record.of_rows(log_p, log_q, *spec.parameters)
    return kd, u + teacher.missing * q, q


def local_columns(ids: Tensor, span: slice) -> tuple[Tensor, Tensor]:
    """[M, K]: columns among the classes of a span, 0 for the ids that are not; and which are."""
    here = (ids >= span.start) & (ids < span.stop)
    return torch.where(here, ids - span.start, 0).long(), here


def listed_logits(
    logits: Tensor, bias: Tensor | None, ids: Tensor, shard: Shard | None = None
) -> tuple[Tensor, Tensor]:
    """Raw logits [M, K] at ids, their bias added, and which of them are there.

    Args:
        logits: [M, V], or [M, V_r] of this rank's classes.
    """
    span = slice(0, logits.shape[1]) if shard is None else shard.span
    columns, here = local_columns(ids, span)
    found = logits.gather(1, columns)
    if bias is not None:
        found = found + bias[columns]
    if shard is None:
        return found, here
    found = torch.where(here, found, 0.0)
    shard.add(found)
    return found, (ids >= 0) & (ids < shard.classes)


def topk_by_products(
    kernels: ModuleType,
    shard: Shard | None,
    logits: Tensor,
    teacher: TeacherTopK,
    labels: Tensor | None,
    spec: KDSpec,
    extras: Tensor,
) -> None:
    """Writes extras [M, 8]: those of `cross_entropy_fwd`, with the entropy at the temperature; the
    entropy of what the loss reads of the teacher; 1 where a class that is the student's largest is
    the largest of those listed; and the masses of the listed classes under student and teacher.

    Args:
        kernels: backend module. It reads the logits [M, V] once, or twice at a temperature.
        shard: where the logits are [M, V_r] of this rank's classes.
        teacher: of [M, K].
    """
    top = _largest(logits, spec.student_bias)
    own = extras.new_empty(len(logits), 4)
    if shard is None:
        lse = _own_by_products(kernels, logits, labels, spec, own)
    else:
        plain = dataclasses.replace(spec, divergence="forward_kl", alpha=None, beta=None)
        _, _, stats = stages.kd_loss_fwd(kernels, shard, logits, None, labels, plain, own)
        lse = stats[:, :1] / spec.temperatures + stats[:, 1:2]
        top = shard.gather(top).amax(0)
    extras[:, :4] = own
    raw, listed = listed_logits(logits, spec.student_bias, teacher.ids, shard)
    z = spec.student_bend.behind_bias.of(raw.to(extras.dtype))
    log_q = (z / spec.temperatures - lse).masked_fill(~listed, -torch.inf)
    log_p = teacher.log_probs.to(extras.dtype).masked_fill(~listed, -torch.inf)
    is_top = listed & (log_p == log_p.amax(-1, keepdim=True)) & (raw == top)
    of_loss = teacher.rows(spec)
    read = [of_loss.log_probs.masked_fill(~listed, -torch.inf)]
    if of_loss.log_tail is not None:
        read.append(of_loss.log_tail[:, None])
    extras[:, 4] = torch.special.entr(torch.cat(read, dim=-1).exp()).sum(-1)
    extras[:, 5] = is_top.any(-1).to(extras.dtype)
    extras[:, 6] = log_q.exp().sum(-1)
    extras[:, 7] = log_p.exp().sum(-1)


def _own_by_products(
    kernels: ModuleType, logits: Tensor, labels: Tensor | None, spec: KDSpec, own: Tensor
) -> Tensor:
    """Writes the student's, [M, 4], and returns log sum exp [M, 1] at the temperature."""
    bend, temperature = spec.student_bend, spec.temperatures
    kernels.cross_entropy_fwd(logits, None, labels, _hard_spec(bend), own)
    softer = Bend()
    if isinstance(temperature, Tensor):
        logits = bend.of(logits.to(own.dtype)) / temperature
    elif temperature == 1.0:
        return own[:, :1]
    else:
        cap = None if bend.cap is None else bend.cap / temperature
        softer = Bend(bend.scale / temperature, cap, bend.bias)
    found = torch.empty_like(own)
    kernels.cross_entropy_fwd(logits, None, None, _hard_spec(softer), found)
    own[:, 3] = found[:, 3]
    return found[:, :1]


def _hard_spec(bend: Bend) -> KDSpec:
    return KDSpec(**bend.options("student"), student_bias=bend.bias)


def _largest(logits: Tensor, bias: Tensor | None) -> Tensor:
    """[M, 1], of logits [M, V] with their bias, which are not stored."""
    if bias is None:
        return logits.amax(-1, keepdim=True)
    parts = zip(logits.split(_COLUMNS, dim=1), bias.split(_COLUMNS), strict=True)
    of_parts = [(columns + own).amax(-1, keepdim=True) for columns, own in parts]
    return torch.cat(of_parts, dim=-1).amax(-1, keepdim=True)

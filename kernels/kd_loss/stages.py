"""The KD loss of rows whose classes several ranks share, by row kernels in stages.

G ranks   M rows   V_r classes of a rank   P_r, Q_r a rank's share of the row's probabilities

    stats   each rank's maxima and sums of its classes            [M, 8], one all-gather
    sums    of f and u, where p and q have to be known first,     [M, 2], one all-gather
            or those of an `OfRow`                                [M, n]
    write   dlogits of its classes

Forward and reverse KL need no sums: by the chain rule, with K_r the KL of a rank's classes alone,

    KL(p || q) = sum_r P_r (K_r + log(P_r / Q_r))

and likewise the cosine distance of logits is a sum over the distances of parts and their lengths.
All ranks add up the same numbers in the same order, in fp64, and so have the same bits. A backend
has, beside `kd_loss_fwd` and the others,

    kd_loss_stats(logits, teacher, labels, spec, has_more) -> [M, len(PART)], less MORE
    kd_loss_sums(logits, teacher, stats [M, 6], spec) -> [M, 2], or [M, num_sums]
    kd_loss_write(logits, teacher, labels, classes, row_weights, stats, spec, dlogits)

in which a label is in [0, V_r], V_r for a class of another rank, and -1 where there is none; stats
[M, 6] are those of `reference.kd_loss_fwd`, of the whole row, with the numbers of an `OfRow` behind
them.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from modxfer_fast.kernels.common import KDSpec
from modxfer_fast.kernels.common.shard import Shard

# Of the classes of a rank, relative to their own maxima; a maximum of -inf, or one far below any
# number, stands beside sums of 0. "mean": K_r. "z_label": 0 where the label is another rank's.
PART = ("max_s", "d_s", "max_t", "d_t", "d_1", "mean", "mean_x", "z_label")
# With by-products: means of z - max under both softmaxes, and whether a class is the largest of
# both.
MORE = ("mean_x_s", "mean_x_t", "is_top_shared")


def local_labels(labels: Tensor | None, shard: Shard) -> Tensor | None:
    """[M] int64 as the row kernels take them."""
    if labels is None:
        return None
    here = shard.span
    size = here.stop - here.start
    local = labels - here.start
    local = torch.where((local >= 0) & (local < size), local, size)
    return torch.where((labels >= 0) & (labels < shard.classes), local, -1)


def kd_loss_fwd(
    kernels: ModuleType,
    shard: Shard,
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor | None,
    spec: KDSpec,
    extras: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As the row kernel of this name: kd, ce [M] and stats, the same on all ranks.

    Args:
        kernels: backend module.
        student_logits, teacher_logits: [M, V_r] of this rank's classes. Without a teacher, beside a
            kd_weight of 0, the student stands in for it.
        labels: [M] of all classes.
    """
    has_teacher = teacher_logits is not None
    if teacher_logits is None:
        teacher_logits, spec = _beside_itself(student_logits, spec)
    has_more = extras is not None and extras.shape[1] > 1
    local = local_labels(labels, shard)
    parts = kernels.kd_loss_stats(student_logits, teacher_logits, local, spec, has_more)
    row = Row(shard.gather(parts), shard, spec)
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    kd, u_sum = row.divergence()
    record = spec.record
    numbers: list[Tensor] = []
    if record.row_sums not in ("mean_under_p", "mean_under_q"):
        stats = row.stats(torch.zeros_like(kd)).to(dtype)
        sums = kernels.kd_loss_sums(student_logits, teacher_logits, stats, spec)
        of_ranks = shard.gather(sums).double()
        if record.whole is None:
            kd, u_sum = of_ranks.sum(0).unbind(-1)
        else:
            joined = record.whole.joined(of_ranks)
            kd, u_sum, *numbers = record.whole.value(joined.unbind(-1), spec.parameters[0])
            if record.row_sums == "of_logits":
                u_sum = row.zeros_or_nan()
                kd = kd + u_sum
    if extras is not None:
        row.write_extras(extras, local)
    kd = kd.clamp(min=0.0) if has_teacher else torch.zeros_like(kd)  # below is rounding
    stats = torch.cat([row.stats(u_sum), *[number[:, None] for number in numbers]], dim=-1)
    return kd.to(dtype), row.cross_entropy(local).to(dtype), stats.to(dtype)


def kd_loss_fwd_bwd(
    kernels: ModuleType,
    shard: Shard,
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor | None,
    row_weights: Tensor,
    spec: KDSpec,
    dlogits: Tensor,
    extras: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As the row kernel of this name: kd, ce [M], and writes dlogits [M, V_r]."""
    of_both = (student_logits, teacher_logits)
    kd, ce, stats = kd_loss_fwd(kernels, shard, *of_both, labels, spec, extras)
    if teacher_logits is None:
        teacher_logits, spec = _beside_itself(student_logits, spec)
    logits, local = (student_logits, teacher_logits), local_labels(labels, shard)
    kernels.kd_loss_write(*logits, local, shard.classes, row_weights, stats, spec, dlogits)
    return kd, ce


def _beside_itself(student_logits: Tensor, spec: KDSpec) -> tuple[Tensor, KDSpec]:
    """The student in the place of a teacher."""
    return student_logits, spec.of_heads(spec.student_bias, spec.student_bias)


class Row:
    """Rows [M] put together from the parts [G, M, ...] of all ranks."""

    def __init__(self, parts: Tensor, shard: Shard, spec: KDSpec):
        self._spec, self._shard = spec, shard
        columns = parts.double().unbind(-1)
        self._part = part = dict(zip((*PART, *MORE), columns, strict=False))
        self._top_s, self._top_t = part["max_s"].amax(0), part["max_t"].amax(0)
        temperature: Any = spec.temperature
        if spec.softening is not None:
            temperature = spec.softening[:, 0].double()
        self._inverse = inverse = 1.0 / temperature
        below_s = (part["max_s"] - self._top_s) * inverse
        below_t = (part["max_t"] - self._top_t) * inverse
        d_1 = part["d_1"] * (part["max_s"] - self._top_s).exp()
        sums = (part["d_s"] * below_s.exp(), part["d_t"] * below_t.exp(), d_1)
        self._logd_s, self._logd_t, self._logd_1 = (each.sum(0).log() for each in sums)
        # logarithms: a share may be too small to be a number
        self._log_share_s = part["d_s"].log() + below_s - self._logd_s
        self._log_share_t = part["d_t"].log() + below_t - self._logd_t
        self.lse = self._top_s + self._logd_1

    def divergence(self) -> tuple[Tensor, Tensor]:
        """(kd, sum u) of a KL; of another divergence, zeros."""
        under = self._spec.record.row_sums
        zeros = torch.zeros_like(self.lse)
        if under not in ("mean_under_p", "mean_under_q"):
            return zeros, zeros
        is_p = under == "mean_under_p"
        shares = (self._log_share_t, self._log_share_s)
        log_a, log_b = shares if is_p else reversed(shares)
        a = log_a.exp()
        # a share of 0 has no mean; one that meets none on the other side is infinitely far from it
        of_part = a * (self._part["mean"] + (log_a - log_b))
        kd = torch.where(a == 0, 0.0, torch.where(log_b == -torch.inf, torch.inf, of_part)).sum(0)
        return kd, zeros - 1.0 if is_p else kd

    def zeros_or_nan(self) -> Tensor:
        """NaN of a row with NaN, +inf or no class."""
        return 0.0 * (self._logd_s + self._logd_t)

    def stats(self, u_sum: Tensor) -> Tensor:
        return torch.stack(
            [self._top_s, self._logd_s, self._top_t, self._logd_t, u_sum, self._logd_1], dim=-1
        )

    def cross_entropy(self, labels: Tensor | None) -> Tensor:
        spec = self._spec
        if labels is None or spec.ce_weight == 0.0:
            return torch.zeros_like(self.lse)
        ce = self.lse - self._part["z_label"].sum(0)
        if spec.label_smoothing:
            means = (self._part["max_s"] + self._part["mean_x"]).unbind()
            mean = sum(size * own for size, own in zip(self._shard.sizes, means, strict=True))
            ce = ce + spec.label_smoothing * (self.lse - mean / self._shard.classes - ce)
        return torch.where(labels >= 0, ce, 0.0)

    def write_extras(self, extras: Tensor, labels: Tensor | None) -> None:
        """As `reference.kd_loss_fwd` says."""
        part, inverse = self._part, self._inverse
        extras[:, 0] = self.lse
        if extras.shape[1] == 1:
            return
        z_label = part["z_label"].sum(0)
        has_label = torch.zeros_like(z_label, dtype=torch.bool) if labels is None else labels >= 0
        extras[:, 1] = torch.where(has_label, z_label - self.lse, 0.0)
        extras[:, 2] = has_label & (z_label == self._top_s)
        sides = [(self._log_share_s, part["d_s"], part["mean_x_s"])]
        if extras.shape[1] > 4:
            sides.append((self._log_share_t, part["d_t"], part["mean_x_t"]))
        for column, (log_share, d, mean_x) in enumerate(sides, start=3):
            share = log_share.exp()
            entropy = share * (d.log() - mean_x * inverse - log_share)
            extras[:, column] = torch.where(share == 0, 0.0, entropy).sum(0)
        if extras.shape[1] == 4:
            return
        at_top = (part["max_s"] == self._top_s) & (part["max_t"] == self._top_t)
        extras[:, 5] = (at_top & (part["is_top_shared"] > 0)).any(0)

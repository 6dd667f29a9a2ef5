"""The rows of a teacher that lists K classes, beside a student whose classes several ranks share.

G ranks   M rows   V_r classes of a rank   K listed; formulas in topk.py

    stats   of all classes of a rank, and of those that are not listed     [M, 16], one all-gather
    list    the student's K logits, of which each rank has some            [M, K], one all-reduce
    sums    f and u of the classes that are not listed, where these are    [M, 2], one all-gather
            no bucket: of tail "renormalise"
    write   dlogits of its classes

With the K logits and the share of the others every rank has the K + 1 classes of a row, and takes
their terms in fp64, the same bits on all of them. What reads V_r classes is a row kernel of
stages.py, between whose calls the listed logits become -inf.
"""

import dataclasses
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from modxfer_fast.kernels.common import KDSpec
from modxfer_fast.kernels.common.shard import Shard
from modxfer_fast.kernels.kd_loss import stages
from modxfer_fast.kernels.kd_loss.topk import TopKRows, list_terms, listed_logits, local_columns

_LEAST = -1e38  # stands for the maximum of no class, as in the row kernels


def topk_kd_loss_fwd(
    kernels: ModuleType,
    shard: Shard,
    student_logits: Tensor,
    teacher: TopKRows,
    labels: Tensor | None,
    spec: KDSpec,
    extras: Tensor | None = None,
) -> tuple[Tensor, Tensor, None]:
    """As the row kernel of this name: kd, ce [M], the same on all ranks.

    Args:
        kernels: backend module.
        student_logits: [M, V_r] of this rank's classes; those that are listed become -inf.
        labels: [M] of all classes.
        extras: [M, 1], written where given: log sum exp of the student's logits.
    """
    rows = _Rows(kernels, shard, student_logits, teacher, labels, spec, extras)
    return rows.kd, rows.ce, None


def topk_kd_loss_fwd_bwd(
    kernels: ModuleType,
    shard: Shard,
    student_logits: Tensor,
    teacher: TopKRows,
    labels: Tensor | None,
    row_weights: Tensor,
    spec: KDSpec,
    dlogits: Tensor,
    extras: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As the row kernel of this name: kd, ce [M], and writes dlogits [M, V_r]."""
    rows = _Rows(kernels, shard, student_logits, teacher, labels, spec, extras)
    rows.write(row_weights, dlogits)
    return rows.kd, rows.ce


class _Rows:
    """Losses of rows [M], and what their gradients need."""

    def __init__(
        self,
        kernels: ModuleType,
        shard: Shard,
        logits: Tensor,
        teacher: TopKRows,
        labels: Tensor | None,
        spec: KDSpec,
        extras: Tensor | None,
    ):
        self._kernels, self._shard, self._logits = kernels, shard, logits
        self._teacher, self._labels, self._spec = teacher, labels, spec
        self._dtype = torch.promote_types(logits.dtype, torch.float32)
        self._local = local = stages.local_labels(labels, shard)
        of_all = kernels.kd_loss_stats(logits, logits, local, spec, False)
        raw, listed = listed_logits(logits, spec.student_bias, teacher.ids, shard)
        self._z = spec.student_bend.behind_bias.of(raw.double()).masked_fill(~listed, -torch.inf)
        self._columns, self._here = local_columns(teacher.ids, shard.span)
        blank = torch.where(self._here, -torch.inf, torch.inf).to(logits.dtype)
        logits.scatter_reduce_(1, self._columns, blank, "amin")
        of_others = kernels.kd_loss_stats(logits, logits, None, spec, False)
        parts = shard.gather(torch.stack([of_all, of_others], dim=1))  # [G, M, 2, 8]

        row = stages.Row(parts[:, :, 0], shard, spec)
        whole = row.stats(torch.zeros_like(row.lse))
        self._top, self._logd, *_, self._logd_1 = whole.split(1, dim=1)
        self._lse = row.lse[:, None]
        self._max_o, self._d_o = _joined(parts[:, :, 1], spec.temperatures)
        log_q = (self._z - self._top) / spec.temperatures - self._logd
        log_q_tail = (self._max_o - self._top) / spec.temperatures + self._d_o.log() - self._logd
        kd, self._u, self._q = list_terms(teacher, listed, log_q, log_q_tail, shard.classes, spec)
        self._q_tail, self._u_sum = log_q_tail.exp(), self._u.sum(-1, keepdim=True)
        self._has_u = teacher.tail == "renormalise" and spec.record.row_sums != "mean_under_p"
        if self._has_u:
            sums = kernels.kd_loss_sums(*self._of_others(), self._stats(self._u_sum), spec)
            f_sum, u_sum = shard.gather(sums).double().sum(0).unbind(-1)
            kd, self._u_sum = kd + f_sum, self._u_sum + u_sum[:, None]
        if teacher.tail != "none" and spec.record.row_sums == "mean_under_p":
            self._u_sum = -torch.ones_like(self._u_sum)  # exactly: equal rows have no gradient
        if extras is not None:
            extras[:, 0] = row.lse
        dtype = self._dtype
        self.kd, self.ce = kd.to(dtype), row.cross_entropy(local).to(dtype)

    def _of_others(self) -> tuple[Tensor, Tensor]:
        """Logits of the classes that are not listed, and of a teacher that gives them nothing."""
        nothing = self._logits.new_full((1, self._logits.shape[1]), -torch.inf)
        return self._logits, nothing.expand_as(self._logits)

    def _stats(self, u_sum: Tensor, *, of_others: bool = False) -> Tensor:
        """[M, 6] of whole rows; or with q among the others alone."""
        top, logd, logd_1 = self._top, self._logd, self._logd_1
        if of_others:
            top, logd, logd_1 = self._max_o, self._d_o.log(), self._lse - self._max_o
            logd = logd.masked_fill(self._d_o == 0, 0.0)
        zero = torch.zeros_like(top)
        stats = torch.cat([top, logd, zero, zero, u_sum, logd_1], dim=-1)
        return stats.to(self._dtype)

    def write(self, row_weights: Tensor, dlogits: Tensor) -> None:
        spec, local, labels = self._spec, self._local, self._labels
        if self._has_u:
            of_kernel, stats = spec, self._stats(self._u_sum)
        else:  # u of the others is their share of the tail's, of which q is a multiple
            u_tail = self._u[:, -1:] if self._teacher.tail == "bucket" else 0.0
            of_share = u_tail - self._q_tail * self._u_sum
            of_share = torch.where(self._d_o == 0, 0.0, of_share)
            of_kernel = dataclasses.replace(spec, divergence="forward_kl", alpha=None, beta=None)
            stats = self._stats(-of_share, of_others=True)
        if local is not None and labels is not None:  # one that is listed is none of the others
            is_listed = (self._teacher.ids == labels[:, None]).any(-1)
            local = torch.where(is_listed & (local >= 0), self._logits.shape[1], local)
        self._kernels.kd_loss_write(
            *(*self._of_others(), local, self._shard.classes, row_weights, stats, of_kernel),
            dlogits,
        )
        dz = torch.where(row_weights[:, None] != 0, row_weights[:, None] * self._of_list(), 0.0)
        written = dlogits.gather(1, self._columns)  # nothing, or what label smoothing takes
        dlogits.scatter_add_(
            1, self._columns, torch.where(self._here, dz.to(dlogits.dtype) - written, 0.0)
        )

    def _of_list(self) -> Tensor:
        """dlogits [M, K] of the listed classes, of rows of weight 1."""
        spec, labels, num_listed = self._spec, self._labels, self._z.shape[1]
        u, q = (each[:, :num_listed] for each in (self._u, self._q))
        dz = spec.kd_weights / spec.temperatures * (u - q * self._u_sum)
        q_1 = (self._z - self._lse).exp()
        if labels is not None and spec.ce_weight != 0.0:
            is_label = self._teacher.ids == labels[:, None]
            has_label = (labels >= 0) & (labels < self._shard.classes)
            target = spec.label_smoothing / self._shard.classes + torch.where(
                is_label, 1.0 - spec.label_smoothing, 0.0
            )
            dz = dz + spec.ce_weight * has_label[:, None] * (q_1 - target)
        dz = dz + 2.0 * spec.z_loss_weight * self._lse * q_1
        slope: Any = spec.student_bend.slope(self._z)
        return dz * slope


def _joined(parts: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor]:
    """Maximum and sum e^((z - max) / temperature), [M, 1] each, from parts [G, M, 8] of ranks."""
    tops, sums = parts[..., :2].double().clamp(min=_LEAST).split(1, dim=-1)
    top = tops.amax(0)
    return top, (sums * ((tops - top) / temperature).exp()).sum(0)

"""Cases for the row kernels of a `kd_loss` backend, and their check against the fp64 reference."""

import dataclasses
import math
from types import ModuleType

import torch
from torch import Tensor

from modxfer_fast.kernels.common import KDSpec
from modxfer_fast.kernels.divergences import DIVERGENCES
from modxfer_fast.kernels.kd_loss import reference
from modxfer_fast.testing import assert_within_budget

SUMS_OVER_CLASSES = [r.name for r in DIVERGENCES.values() if r.terms is not None]
OF_PROBABILITIES = [r.name for r in DIVERGENCES.values() if r.row_sums != "of_logits"]
# One divergence of each way in which row kernels find the sums of a row: for what is no matter of
# the divergence itself.
ONE_OF_A_KIND = list({r.row_sums: r.name for r in reversed(DIVERGENCES.values())}.values())[::-1]


@dataclasses.dataclass
class Rows:
    """Arguments of the row kernels: logits [M, V], labels [M] or None, row_weights [M]."""

    student: Tensor
    teacher: Tensor
    labels: Tensor | None
    row_weights: Tensor


def close_rows(
    rows: int,
    vocab_size: int,
    dtype: torch.dtype = torch.float32,
    *,
    delta: float = 0.03,
    peak: float = 8.0,
    device: str = "cpu",
    seed: int = 0,
) -> Rows:
    """A student `delta` away from its teacher, one planted peak a row, every fourth row masked."""
    generator = torch.Generator(device).manual_seed(seed)

    def randn() -> Tensor:
        return torch.randn(rows, vocab_size, generator=generator, device=device)

    teacher = 3.0 * randn()
    index = torch.arange(rows, device=device)
    labels = (index * 7919) % vocab_size
    teacher[index, labels] += peak
    student = teacher + delta * randn()
    weights = 0.25 + torch.rand(rows, generator=generator, device=device)
    masked = index % 4 == 3
    return Rows(
        student.to(dtype),
        teacher.to(dtype),
        labels.masked_fill(masked, -100),
        weights.masked_fill(masked, 0.0),
    )


def check_row_kernels(
    impl: ModuleType, rows: Rows, spec: KDSpec, dlogits_dtype: torch.dtype | None = None
) -> None:
    """All three functions of `impl` against the reference in fp64; buffers begin as NaN."""
    student, teacher, labels, weights = rows.student, rows.teacher, rows.labels, rows.row_weights
    dlogits_dtype = dlogits_dtype or student.dtype
    kd_truth, ce_truth, stats_truth, dlogits_truth = _reference(rows, spec, torch.float64)
    kd_plain, ce_plain, stats_plain, dlogits_plain = _reference(rows, spec, torch.float32)
    dlogits_plain = dlogits_plain.to(dlogits_dtype)
    # what is summed: x = log-softmax under the KL, probabilities under the gradient
    kd_scale = stats_truth[:, [1, 3]].abs().max().item() if len(student) else 0.0
    if spec.record.mixes is not None:  # log(m / q) is a sum of logs of the weights
        kd_scale = max(kd_scale, *(-math.log(w) for w in spec.record.mixes(*spec.parameters)))
    summed_f, summed_u = term_sums(student, teacher, spec)
    if len(student):
        kd_scale *= max(1.0, summed_f.max().item())
    ce_scale = stats_truth[:, 5].abs().max().item() if len(student) else 0.0
    jumps = gradient_jumps(student, teacher, spec).sum(-1)
    u_sum_scale = dlogits_scale = 0.0
    if len(student):
        eps = torch.finfo(torch.float32).eps
        u_sum_scale = jumps.max().item() / eps + summed_u.max().item()
        of_row = 2.0 * abs(spec.kd_weight) / spec.temperature * weights.double().abs() * jumps
        of_row += abs(spec.kd_weight) / spec.temperature * weights.double().abs() * summed_u * eps
        dlogits_scale = of_row.max().item() / torch.finfo(dlogits_dtype).eps
    if dlogits_dtype == torch.float32 and len(student):
        dlogits_scale += weights.abs().max().item() * (
            abs(spec.kd_weight) / spec.temperature + abs(spec.ce_weight)
        )

    kd, ce, stats = impl.kd_loss_fwd(student, teacher, labels, spec)
    assert kd.dtype == ce.dtype == stats.dtype == torch.float32
    assert_within_budget(kd, kd_truth, kd_plain, "kd", kd_scale)
    assert_within_budget(ce, ce_truth, ce_plain, "ce", ce_scale)
    assert_within_budget(stats[:, :5], stats_truth[:, :5], stats_plain[:, :5], "stats", u_sum_scale)
    if labels is not None and spec.ce_weight != 0.0:  # logd_1 belongs to the cross entropy
        labelled = (labels >= 0) & (labels < student.shape[1])
        logd_1 = (part[labelled, 5] for part in (stats, stats_truth, stats_plain))
        # the log of a sum, which is at least 1, inherits its relative error
        assert_within_budget(*logd_1, "logd_1", scale=1.0)

    dlogits = torch.full_like(student, float("nan"), dtype=dlogits_dtype)
    impl.kd_loss_bwd(student, teacher, labels, weights, stats, spec, dlogits)
    assert_within_budget(dlogits, dlogits_truth, dlogits_plain, "bwd dlogits", dlogits_scale)

    dlogits = torch.full_like(student, float("nan"), dtype=dlogits_dtype)
    fused_kd, fused_ce = impl.kd_loss_fwd_bwd(student, teacher, labels, weights, spec, dlogits)
    assert torch.equal(fused_kd, kd), "kd of the fused call differs from the forward's"
    assert torch.equal(fused_ce, ce), "ce of the fused call differs from the forward's"
    assert_within_budget(dlogits, dlogits_truth, dlogits_plain, "fused dlogits", dlogits_scale)
    assert (dlogits[weights == 0] == 0).all(), "a row of weight 0 has a gradient"


def gradient_jumps(student: Tensor, teacher: Tensor, spec: KDSpec) -> Tensor:
    """[M, V] fp64: by how much a rounding of d = log p - log q may change u = q dD/dq.

    It is 0 but where u jumps at p = q and |d| is less than what fp32 leaves of a difference.
    """
    if spec.record.row_sums == "of_logits":
        return torch.zeros_like(student, dtype=torch.float64)
    x_s, x_t = (
        (z.double() - z.double().amax(-1, keepdim=True)) / spec.temperature
        for z in (student, teacher)
    )
    log_q, log_p = x_s.log_softmax(-1), x_t.log_softmax(-1)
    q = log_q.exp()
    above, below = (
        spec.record.of_rows(log_q + d, log_q, *spec.parameters)[1] for d in (1e-9, -1e-9)
    )
    jump = (above - below).abs()
    rounding = 8 * torch.finfo(torch.float32).eps * (1.0 - x_s - x_t)
    smooth, certain = jump < 1e-6 * q, (log_p - log_q).abs() >= rounding
    return jump.masked_fill(smooth | certain, 0.0).nan_to_num()


def term_sums(student: Tensor, teacher: Tensor, spec: KDSpec) -> tuple[Tensor, Tensor]:
    """[M] fp64 each: sums of |f| and |u|, what the divergence and its gradient are sums of.

    0 of those whose scales are known without.
    """
    if spec.divergence in ("forward_kl", "reverse_kl", "jsd"):
        return 2 * (torch.zeros(len(student), dtype=torch.float64, device=student.device),)
    log_p, log_q = (spec.record.operand(z.double() / spec.temperature) for z in (teacher, student))
    if spec.record.terms is None:
        loss, u = spec.record.of_rows(log_p, log_q, *spec.parameters)
        return loss.nan_to_num(), u.abs().nan_to_num().sum(-1)
    f, u = spec.record.terms(log_p, log_q, *spec.parameters)
    return f.abs().nan_to_num().sum(-1), u.abs().nan_to_num().sum(-1)


def _reference(rows: Rows, spec: KDSpec, dtype: torch.dtype) -> tuple[Tensor, ...]:
    student, teacher = rows.student.to(dtype), rows.teacher.to(dtype)
    kd, ce, stats = reference.kd_loss_fwd(student, teacher, rows.labels, spec)
    dlogits = torch.empty_like(student)
    reference.kd_loss_bwd(student, teacher, rows.labels, rows.row_weights, stats, spec, dlogits)
    return kd, ce, stats, dlogits

"""A check of row kernels that add the biases of heads: the bits of logits that have them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from modxfer_fast import TeacherTopK
from modxfer_fast.kernels.common import KDSpec
from tests.support.kd_rows import Rows, close_rows

V = 701
BENDS = {"student_logit_scale": 0.5, "student_softcap": 8.0, "teacher_softcap": 12.0}
HARD = {"ce_weight": 0.4, "z_loss_weight": 0.01}


def biases(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Of student and teacher, [V]: of size 1, down to -1e4, and -inf where both exclude a class."""
    generator = torch.Generator().manual_seed(3)
    both = torch.randn(2, V, generator=generator)
    low = torch.arange(5, V, 7)
    both[:, low] = -(10.0 ** torch.linspace(-2.0, 4.0, len(low)))
    both[:, 11::53] = -torch.inf
    student, teacher = both.to(dtype)
    return student, teacher


def of_rows(impl: Any, rows: Rows, spec: KDSpec) -> list[Tensor]:
    dlogits, extras = torch.full_like(rows.student, torch.nan), torch.full((5, 6), torch.nan)
    given = (rows.student, rows.teacher, rows.labels)
    kd, ce, stats = impl.kd_loss_fwd(*given, spec)
    fused = impl.kd_loss_fwd_bwd(*given, rows.row_weights, spec, dlogits, extras)
    later = torch.full_like(dlogits, torch.nan)
    impl.kd_loss_bwd(*given, rows.row_weights, stats, spec, later)
    return [kd, ce, stats, *fused, dlogits, extras, later]


def of_stages(impl: Any, rows: Rows, spec: KDSpec) -> list[Tensor]:
    logits, dlogits = (rows.student, rows.teacher), torch.full_like(rows.student, torch.nan)
    labels = rows.labels.clamp(min=-1)
    parts = impl.kd_loss_stats(*logits, labels, spec, True)
    stats = parts[:, [0, 0, 2, 2, 5, 4]].float()
    stats[:, 1::2] = 6.5  # as near the truth as sums need
    sums = impl.kd_loss_sums(*logits, stats, spec)
    impl.kd_loss_write(*logits, labels, 2 * V, rows.row_weights, stats, spec, dlogits)
    return [parts, sums, dlogits]


def of_labels(impl: Any, rows: Rows, spec: KDSpec) -> list[Tensor]:
    dlogits, extras = torch.full_like(rows.student, torch.nan), torch.full((5, 4), torch.nan)
    given = (rows.student, None, rows.labels)
    alone = impl.cross_entropy_fwd(*given, spec)[1]
    fused = impl.cross_entropy_fwd_bwd(*given, rows.row_weights, spec, dlogits, extras)[1]
    return [alone, fused, dlogits, extras]


def of_lists(impl: Any, rows: Rows, spec: KDSpec) -> list[Tensor]:
    found = []
    log_probs, ids = close_rows(5, V).teacher.log_softmax(-1).topk(9)
    for tail in ("bucket", "renormalise"):
        signal = TeacherTopK(ids, log_probs, tail).rows(spec)
        dlogits, lse = torch.full_like(rows.student, torch.nan), torch.full((5, 1), torch.nan)
        given = (rows.student, signal, rows.labels)
        found += impl.topk_kd_loss_fwd(*given, spec)[:2]
        found += impl.topk_kd_loss_fwd_bwd(*given, rows.row_weights, spec, dlogits, lse)
        found += [dlogits, lse]
    return found


FUNCTIONS: dict[str, Callable[[Any, Rows, KDSpec], list[Tensor]]] = {
    "rows": of_rows,
    "stages": of_stages,
    "labels": of_labels,
    "lists": of_lists,
}


def check_biases(
    impl: Any,
    functions: str,
    divergence: str = "jsd",
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> None:
    """Those of a backend give the same bits with biases as of logits with them.

    Args:
        functions: of `FUNCTIONS`.
        dtype: of the biases.
    """
    rows, (bias_s, bias_t) = close_rows(5, V), biases(dtype)
    spec = KDSpec(divergence, temperature=1.5, **HARD | options).checked()
    sums = Rows(rows.student + bias_s, rows.teacher + bias_t, rows.labels, rows.row_weights)
    of_sums = FUNCTIONS[functions](impl, sums, spec)
    found = FUNCTIONS[functions](impl, rows, spec.of_heads(bias_s, bias_t))
    assert not any(map(torch.equal, found, FUNCTIONS[functions](impl, rows, spec)))
    for index, (one, other) in enumerate(zip(found, of_sums, strict=True)):
        assert not one.isnan().any(), index
        assert torch.equal(one, other), index

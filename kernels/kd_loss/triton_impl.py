"""KD loss of rows of logits, one program per row; probabilities are never stored.

M rows   V classes   z_s, z_t logits   p teacher   q student   d = log p - log q

Passes over the two rows of logits; f and u are those of `reference.py`:

    1  maxima and denominators of both softmaxes, online; the divergence itself where it is a mean
       of d under p or q
    2  sum f and sum u, for a divergence that needs normalised probabilities
    3  dlogits = row_weight (kd_weight / temperature (u - q sum u) + ce_weight (q_1 - onehot))

Label smoothing, z-loss and by-products (extras) change passes 1 and 3 where they are asked for.
KL(p || q) = sum p ((z_t - max_t) - (z_s - max_s)) / temperature + log(d_s / d_t) needs no
normalised probability, nor does KL(q || p): they skip pass 2. ROW_SUMS, of the divergence's record
in `kernels.divergences`, says which passes there are. Loss alone skips pass 3.
Divergences that are functions of sums over the row have their own pass 2 (triton_of_row.py), and so
have those of the logits themselves (triton_of_logits.py).
The bias of a head, and what a model does to its logits (triton_bend.py), is done to each tile that
is loaded.
Consecutive passes run in opposite directions: a pass begins with the tiles that the one before it
left in the cache. Pass 3 always runs left to right, because dlogits may lie over the student's
logits with half their width.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from modxfer_fast.kernels.common import KDSpec, triton_device
from modxfer_fast.kernels.divergences import Divergence
from modxfer_fast.kernels.kd_loss import triton_cross_entropy
from modxfer_fast.kernels.kd_loss.config import row_config
from modxfer_fast.kernels.kd_loss.teacher_topk import teacher_topk as teacher_topk
from modxfer_fast.kernels.kd_loss.triton_bend import bend_constants, unbend
from modxfer_fast.kernels.kd_loss.triton_cross_entropy import add_hard_dlogits
from modxfer_fast.kernels.kd_loss.triton_divergences import class_terms, probabilities
from modxfer_fast.kernels.kd_loss.triton_of_logits import of_logits_sums, of_logits_terms
from modxfer_fast.kernels.kd_loss.triton_of_row import of_row_sums, of_row_terms
from modxfer_fast.kernels.kd_loss.triton_softmax import (
    LOG2E,
    load_bent,
    load_classes,
    softmax_stats,
)


@triton.jit
def _divergence_sums(
    student, teacher,                    # in   [V], as of load_classes
    V,
    max_s, logd_s, max_t, logd_t,
    scale, c0, c1, c2, c3,
    DIVERGENCE: tl.constexpr, PARTS: tl.constexpr, BLOCK_V: tl.constexpr,
    BEND_S: tl.constexpr, BEND_T: tl.constexpr,
):  # fmt: skip
    """Pass 2: sum f and sum u, right to left."""
    f_sum = tl.zeros([BLOCK_V], tl.float32)
    u_sum = tl.zeros([BLOCK_V], tl.float32)
    num_tiles = tl.cdiv(V, BLOCK_V)
    for i in range(num_tiles):
        offs_v = (num_tiles - 1 - i) * BLOCK_V + tl.arange(0, BLOCK_V)
        z_s = load_bent(student, offs_v, V, BEND_S)
        z_t = load_bent(teacher, offs_v, V, BEND_T)
        p, q, d, log2_p, log2_q = probabilities(z_s, z_t, max_s, logd_s, max_t, logd_t, scale)
        f, u = class_terms(p, q, d, log2_p, log2_q, c0, c1, c2, c3, DIVERGENCE, PARTS)
        f_sum += f
        u_sum += u
    return tl.sum(f_sum, axis=0), tl.sum(u_sum, axis=0)


@triton.jit
def _row_loss(
    student, teacher, label,             # in   [V] as of load_classes, twice; scalar (-1: none)
    extras_ptr,                          # out  [EXTRAS]
    V,
    scale, inv_temperature, c0, c1, c2, c3, smoothing,
    DIVERGENCE: tl.constexpr, PARTS: tl.constexpr, ROW_SUMS: tl.constexpr, HAS_CE: tl.constexpr,
    NEEDS_D_1: tl.constexpr, SMOOTHS: tl.constexpr, EXTRAS: tl.constexpr,
    BLOCK_V: tl.constexpr, VECTOR: tl.constexpr, BEND_S: tl.constexpr, BEND_T: tl.constexpr,
):  # fmt: skip
    """Passes 1 and 2: (kd, ce) of one row, its statistics, and what else is of the row."""
    max_s, d_s, max_t, d_t, d_1, kd, mean_x, mean_x_s, mean_x_t, shares_top = softmax_stats(
        student, teacher, V, scale, inv_temperature, ROW_SUMS, NEEDS_D_1, SMOOTHS,
        EXTRAS > 1, BLOCK_V, VECTOR, BEND_S, BEND_T,
    )  # fmt: skip
    logd_s = tl.log(d_s)
    logd_t = tl.log(d_t)
    logd_1 = tl.log(d_1)
    of_row = scale  # a place, where a divergence has nothing of the row
    if ROW_SUMS == "mean_under_p":
        u_sum = -1.0
    elif ROW_SUMS == "mean_under_q":
        u_sum = kd
    elif ROW_SUMS == "of_row":
        kd, u_sum, slope, log2_s = of_row_sums(
            student, teacher, V, max_s, logd_s, max_t, logd_t,
            scale, c0, c1, DIVERGENCE, BLOCK_V, BEND_S, BEND_T,
        )  # fmt: skip
        of_row = (slope, log2_s)
    elif ROW_SUMS == "of_logits":
        kd, u_sum, of_row = of_logits_sums(
            student, teacher, V, logd_s, logd_t, inv_temperature,
            DIVERGENCE, BLOCK_V, BEND_S, BEND_T,
        )  # fmt: skip
    else:
        kd, u_sum = _divergence_sums(
            student, teacher, V, max_s, logd_s, max_t, logd_t,
            scale, c0, c1, c2, c3, DIVERGENCE, PARTS, BLOCK_V, BEND_S, BEND_T,
        )  # fmt: skip
    kd = tl.where(kd < 0, 0.0, kd)  # of rounding
    ce = 0.0
    if HAS_CE:
        z_label = load_classes(student, label, label >= 0, 0.0, BEND_S)
        ce = tl.where(label >= 0, logd_1 - (z_label - max_s), 0.0)
        if SMOOTHS:
            ce += tl.where(label >= 0, smoothing * ((logd_1 - mean_x) - ce), 0.0)
    if EXTRAS > 0:
        tl.store(extras_ptr, max_s + logd_1)
    if EXTRAS > 1:
        x_label = load_classes(student, label, label >= 0, 0.0, BEND_S) - max_s
        tl.store(extras_ptr + 1, tl.where(label >= 0, x_label - logd_1, 0.0))
        tl.store(extras_ptr + 2, tl.where((label >= 0) & (x_label == 0), 1.0, 0.0))
        tl.store(extras_ptr + 3, logd_s - mean_x_s * inv_temperature)
        tl.store(extras_ptr + 4, logd_t - mean_x_t * inv_temperature)
        tl.store(extras_ptr + 5, shares_top)
    return kd, ce, max_s, logd_s, max_t, logd_t, u_sum, logd_1, of_row


@triton.jit
def _write_dlogits(
    student, teacher, label,             # in   [V] as of load_classes, twice; scalar (-1: none)
    dlogits_ptr,                         # out  [V]
    V,
    max_s, logd_s, max_t, logd_t, u_sum, logd_1, of_row,
    row_weight, kd_scale, ce_weight,     # kd_scale = kd_weight / temperature
    smoothing, z_loss_weight,
    scale, c0, c1, c2, c3,
    DIVERGENCE: tl.constexpr, PARTS: tl.constexpr, ROW_SUMS: tl.constexpr, HAS_CE: tl.constexpr,
    SMOOTHS: tl.constexpr, HAS_Z: tl.constexpr,
    UNIT_TEMPERATURE: tl.constexpr, BLOCK_V: tl.constexpr,
    BEND_S: tl.constexpr, BEND_T: tl.constexpr,
):  # fmt: skip
    """Pass 3, left to right: dlogits may lie over the student's logits, see the barriers."""
    # all warps have read the label's logit before one of them may zero it
    tl.debug_barrier()
    if row_weight == 0:
        # nothing is read: an ignored row may hold anything, and half of a chat batch is ignored
        for i in range(tl.cdiv(V, BLOCK_V)):
            offs_v = i * BLOCK_V + tl.arange(0, BLOCK_V)
            zeros = tl.zeros([BLOCK_V], dlogits_ptr.dtype.element_ty)
            tl.store(dlogits_ptr + offs_v, zeros, mask=offs_v < V)
    else:
        kd_factor = row_weight * kd_scale
        ce_factor = tl.where(label >= 0, row_weight * ce_weight, 0.0)
        q_1_factor = ce_factor
        if HAS_Z:
            q_1_factor += 2.0 * row_weight * z_loss_weight * (max_s + logd_1)
        for i in range(tl.cdiv(V, BLOCK_V)):
            offs_v = i * BLOCK_V + tl.arange(0, BLOCK_V)
            z_s = load_bent(student, offs_v, V, BEND_S)
            z_t = load_bent(teacher, offs_v, V, BEND_T)
            p, q, d, log2_p, log2_q = probabilities(z_s, z_t, max_s, logd_s, max_t, logd_t, scale)
            if ROW_SUMS == "of_row":
                slope, log2_s = of_row
                u = of_row_terms(
                    p, q, d, log2_p, log2_q, c0, slope, log2_s, DIVERGENCE
                )  # fmt: skip
            elif ROW_SUMS == "of_logits":
                u = of_logits_terms(z_s, z_t, of_row)
            else:
                _, u = class_terms(p, q, d, log2_p, log2_q, c0, c1, c2, c3, DIVERGENCE, PARTS)
            dlogits = kd_factor * (u - q * u_sum)
            if HAS_CE or HAS_Z:
                q_1 = q
                if not UNIT_TEMPERATURE:
                    q_1 = tl.exp2((z_s - max_s - logd_1) * LOG2E)
                dlogits = add_hard_dlogits(
                    dlogits, q_1, offs_v == label, q_1_factor, ce_factor, smoothing, V,
                    HAS_CE, SMOOTHS, HAS_Z,
                )  # fmt: skip
            dlogits = unbend(dlogits, z_s, BEND_S)
            # without this barrier one warp may overwrite logits that another has yet to load
            tl.debug_barrier()
            tl.store(
                dlogits_ptr + offs_v, dlogits.to(dlogits_ptr.dtype.element_ty), mask=offs_v < V
            )


@triton.jit
def _load_label(labels_ptr, row, stride_lm, V, HAS_LABELS: tl.constexpr):
    """The row's label, or -1 where it has none in [0, V)."""
    label = -1
    if HAS_LABELS:
        raw = tl.load(labels_ptr + row * stride_lm)
        label = tl.where((raw >= 0) & (raw < V), raw, -1).to(tl.int32)
    return label


@triton.jit
def _row_softening(softening_ptr, row, scale, inv_temperature, kd_weight):
    """The three of a row that has a temperature, and a factor of kd_weight, of its own."""
    if softening_ptr is not None:
        inv_temperature = 1.0 / tl.load(softening_ptr + 2 * row)
        scale = inv_temperature * LOG2E
        kd_weight *= tl.load(softening_ptr + 2 * row + 1)
    return scale, inv_temperature, kd_weight


@triton.jit
def _kd_loss_fwd_kernel(
    student_ptr, teacher_ptr,            # in   [M, V]
    bias_s_ptr, bias_t_ptr,              # in   [V], or None
    labels_ptr,                          # in   [M], int64
    softening_ptr,                       # in   [M, 2], fp32, or None
    kd_ptr, ce_ptr,                      # out  [M], fp32
    stats_ptr,                           # out  [M, 6], fp32
    extras_ptr,                          # out  [M, EXTRAS], fp32, or None
    V,
    stride_sm, stride_tm, stride_lm,     # strides, in elements
    scale, inv_temperature, c0, c1, c2, c3, smoothing,
    DIVERGENCE: tl.constexpr, PARTS: tl.constexpr, ROW_SUMS: tl.constexpr, HAS_CE: tl.constexpr,
    SMOOTHS: tl.constexpr, EXTRAS: tl.constexpr, HAS_LABELS: tl.constexpr,
    UNIT_TEMPERATURE: tl.constexpr, BLOCK_V: tl.constexpr, VECTOR: tl.constexpr,
    BEND_S: tl.constexpr, BEND_T: tl.constexpr,
):  # fmt: skip
    # M * V passes 2^31 with a large vocabulary: widen before multiplying by a stride
    row = tl.program_id(0).to(tl.int64)
    label = _load_label(labels_ptr, row, stride_lm, V, HAS_LABELS)
    scale, inv_temperature, _ = _row_softening(softening_ptr, row, scale, inv_temperature, 1.0)
    if EXTRAS > 0:
        extras_ptr += row * EXTRAS
    kd, ce, max_s, logd_s, max_t, logd_t, u_sum, logd_1, _ = _row_loss(
        (student_ptr + row * stride_sm, bias_s_ptr), (teacher_ptr + row * stride_tm, bias_t_ptr),
        label, extras_ptr, V,
        scale, inv_temperature, c0, c1, c2, c3, smoothing,
        DIVERGENCE, PARTS, ROW_SUMS, HAS_CE, not UNIT_TEMPERATURE, SMOOTHS, EXTRAS, BLOCK_V, VECTOR,
        BEND_S, BEND_T,
    )  # fmt: skip
    tl.store(kd_ptr + row, kd)
    tl.store(ce_ptr + row, ce)
    stats_ptr += row * 6
    tl.store(stats_ptr + 0, max_s)
    tl.store(stats_ptr + 1, logd_s)
    tl.store(stats_ptr + 2, max_t)
    tl.store(stats_ptr + 3, logd_t)
    tl.store(stats_ptr + 4, u_sum)
    tl.store(stats_ptr + 5, logd_1)


@triton.jit
def _kd_loss_bwd_kernel(
    student_ptr, teacher_ptr,            # in   [M, V]
    bias_s_ptr, bias_t_ptr,              # in   [V], or None
    labels_ptr,                          # in   [M], int64
    softening_ptr,                       # in   [M, 2], fp32, or None
    row_weights_ptr,                     # in   [M], fp32
    stats_ptr,                           # in   [M, 6], fp32
    dlogits_ptr,                         # out  [M, V]
    V,
    stride_sm, stride_tm, stride_lm, stride_wm, stride_dm,
    kd_weight, ce_weight, smoothing, z_loss_weight,
    scale, inv_temperature, c0, c1, c2, c3,
    DIVERGENCE: tl.constexpr, PARTS: tl.constexpr, ROW_SUMS: tl.constexpr, HAS_CE: tl.constexpr,
    SMOOTHS: tl.constexpr, HAS_Z: tl.constexpr,
    UNIT_TEMPERATURE: tl.constexpr, BLOCK_V: tl.constexpr,
    BEND_S: tl.constexpr, BEND_T: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    student = (student_ptr + row * stride_sm, bias_s_ptr)
    teacher = (teacher_ptr + row * stride_tm, bias_t_ptr)
    label = _load_label(labels_ptr, row, stride_lm, V, HAS_CE)
    row_weight = tl.load(row_weights_ptr + row * stride_wm)
    scale, inv_temperature, kd_weight = _row_softening(
        softening_ptr, row, scale, inv_temperature, kd_weight
    )
    stats_ptr += row * 6
    max_s = tl.load(stats_ptr + 0)
    logd_s = tl.load(stats_ptr + 1)
    max_t = tl.load(stats_ptr + 2)
    logd_t = tl.load(stats_ptr + 3)
    u_sum = tl.load(stats_ptr + 4)
    logd_1 = tl.load(stats_ptr + 5)
    of_row = scale  # a place, where a divergence has nothing of the row
    if ROW_SUMS == "of_row":
        _, _, slope, log2_s = of_row_sums(
            student, teacher, V,
            max_s, logd_s, max_t, logd_t, scale, c0, c1, DIVERGENCE, BLOCK_V, BEND_S, BEND_T,
        )  # fmt: skip
        of_row = (slope, log2_s)
    if ROW_SUMS == "of_logits":
        _, _, of_row = of_logits_sums(
            student, teacher, V,
            logd_s, logd_t, inv_temperature, DIVERGENCE, BLOCK_V, BEND_S, BEND_T,
        )  # fmt: skip
    _write_dlogits(
        student, teacher, label, dlogits_ptr + row * stride_dm, V,
        max_s, logd_s, max_t, logd_t, u_sum, logd_1, of_row,
        row_weight, kd_weight * inv_temperature, ce_weight, smoothing, z_loss_weight,
        scale, c0, c1, c2, c3,
        DIVERGENCE, PARTS, ROW_SUMS, HAS_CE, SMOOTHS, HAS_Z, UNIT_TEMPERATURE,
        BLOCK_V, BEND_S, BEND_T,
    )  # fmt: skip


@triton.jit
def _kd_loss_fwd_bwd_kernel(
    student_ptr, teacher_ptr,            # in   [M, V]
    bias_s_ptr, bias_t_ptr,              # in   [V], or None
    labels_ptr,                          # in   [M], int64
    softening_ptr,                       # in   [M, 2], fp32, or None
    row_weights_ptr,                     # in   [M], fp32
    kd_ptr, ce_ptr,                      # out  [M], fp32
    dlogits_ptr,                         # out  [M, V]
    extras_ptr,                          # out  [M, EXTRAS], fp32, or None
    V,
    stride_sm, stride_tm, stride_lm, stride_wm, stride_dm,
    kd_weight, ce_weight, smoothing, z_loss_weight,
    scale, inv_temperature, c0, c1, c2, c3,
    DIVERGENCE: tl.constexpr, PARTS: tl.constexpr, ROW_SUMS: tl.constexpr, HAS_CE: tl.constexpr,
    SMOOTHS: tl.constexpr, HAS_Z: tl.constexpr, EXTRAS: tl.constexpr, HAS_LABELS: tl.constexpr,
    UNIT_TEMPERATURE: tl.constexpr, BLOCK_V: tl.constexpr, VECTOR: tl.constexpr,
    BEND_S: tl.constexpr, BEND_T: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    student = (student_ptr + row * stride_sm, bias_s_ptr)
    teacher = (teacher_ptr + row * stride_tm, bias_t_ptr)
    label = _load_label(labels_ptr, row, stride_lm, V, HAS_LABELS)
    row_weight = tl.load(row_weights_ptr + row * stride_wm)
    scale, inv_temperature, kd_weight = _row_softening(
        softening_ptr, row, scale, inv_temperature, kd_weight
    )
    if EXTRAS > 0:
        extras_ptr += row * EXTRAS
    kd, ce, max_s, logd_s, max_t, logd_t, u_sum, logd_1, of_row = _row_loss(
        student, teacher, label, extras_ptr, V,
        scale, inv_temperature, c0, c1, c2, c3, smoothing,
        DIVERGENCE, PARTS, ROW_SUMS, HAS_CE,
        (HAS_CE or HAS_Z or EXTRAS > 0) and not UNIT_TEMPERATURE,
        SMOOTHS, EXTRAS, BLOCK_V, VECTOR, BEND_S, BEND_T,
    )  # fmt: skip
    tl.store(kd_ptr + row, kd)
    tl.store(ce_ptr + row, ce)
    _write_dlogits(
        student, teacher, label, dlogits_ptr + row * stride_dm, V,
        max_s, logd_s, max_t, logd_t, u_sum, logd_1, of_row,
        row_weight, kd_weight * inv_temperature, ce_weight, smoothing, z_loss_weight,
        scale, c0, c1, c2, c3,
        DIVERGENCE, PARTS, ROW_SUMS, HAS_CE, SMOOTHS, HAS_Z, UNIT_TEMPERATURE,
        BLOCK_V, BEND_S, BEND_T,
    )  # fmt: skip


cross_entropy_fwd = triton_cross_entropy.cross_entropy_fwd
cross_entropy_fwd_bwd = triton_cross_entropy.cross_entropy_fwd_bwd
available = triton_device.available
supports = triton_device.supports


def kd_loss_fwd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None,
    spec: KDSpec,
    extras: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Per-row losses and what the backward needs of them.

    Args:
        student_logits, teacher_logits: [M, V], last stride 1, any row stride.
        labels: [M] int64 or None.
        extras: written where given, as `reference.kd_loss_fwd` says.

    Returns:
        kd, ce: [M] fp32, unweighted. stats: [M, 6] fp32 as `reference.kd_loss_fwd` documents them.
    """
    kd, ce = _row_outputs(student_logits)
    stats = kd.new_empty(len(kd), 6)
    logits = (student_logits, teacher_logits)
    _launch(_kd_loss_fwd_kernel, *logits, labels, spec, extras, kd, ce, stats)
    return kd, ce, stats


def kd_loss_bwd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None,
    row_weights: Tensor,
    stats: Tensor,
    spec: KDSpec,
    dlogits: Tensor,
) -> None:
    """Writes dlogits [M, V] of sum(row_weights * loss), from the statistics of the forward.

    Args:
        row_weights: [M] fp32; a row of weight 0 gets a row of zeros.
        dlogits: [M, V], last stride 1; may be `student_logits`, or a half-precision view of its
            buffer in which every row begins where the row of logits begins.
    """
    logits = (student_logits, teacher_logits)
    _launch(_kd_loss_bwd_kernel, *logits, labels, spec, None, row_weights, stats, dlogits)


def kd_loss_fwd_bwd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None,
    row_weights: Tensor,
    spec: KDSpec,
    dlogits: Tensor,
    extras: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Both in one launch; returns kd, ce [M] fp32 and writes dlogits as `kd_loss_bwd` does."""
    kd, ce = _row_outputs(student_logits)
    logits = (student_logits, teacher_logits)
    _launch(_kd_loss_fwd_bwd_kernel, *logits, labels, spec, extras, row_weights, kd, ce, dlogits)
    return kd, ce


def kd_loss_stats(*args: Any) -> Tensor:
    from modxfer_fast.kernels.kd_loss import triton_stages  # which imports what stands here

    return triton_stages.kd_loss_stats(*args)


def kd_loss_sums(*args: Any) -> Tensor:
    from modxfer_fast.kernels.kd_loss import triton_stages

    return triton_stages.kd_loss_sums(*args)


def kd_loss_write(*args: Any) -> None:
    from modxfer_fast.kernels.kd_loss import triton_stages

    triton_stages.kd_loss_write(*args)


def topk_kd_loss_fwd(*args: Any) -> tuple[Tensor, Tensor, None]:
    from modxfer_fast.kernels.kd_loss import triton_topk  # which imports what stands here

    return triton_topk.topk_kd_loss_fwd(*args)


def topk_kd_loss_fwd_bwd(*args: Any) -> tuple[Tensor, Tensor]:
    from modxfer_fast.kernels.kd_loss import triton_topk

    return triton_topk.topk_kd_loss_fwd_bwd(*args)


def _row_outputs(student_logits: Tensor) -> tuple[Tensor, Tensor]:
    kd = student_logits.new_empty(student_logits.shape[0], dtype=torch.float32)
    return kd, torch.empty_like(kd)


def _launch(
    kernel: triton.JITFunction,
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None,
    spec: KDSpec,
    extras: Tensor | None,
    *others: Tensor,
) -> None:
    """A program for each row; others: the kernel's other tensors, before extras."""
    rows, vocab_size = student_logits.shape
    if rows == 0:
        return
    dtypes = (student_logits.dtype, teacher_logits.dtype)
    config = row_config(vocab_size, rows, dtypes, warp_size=64 if torch.version.hip else 32)
    of_passes: dict[str, Any] = {}
    has_ce = labels is not None and spec.ce_weight != 0.0
    if kernel is not _kd_loss_bwd_kernel:  # 1 and 2
        of_passes |= {"VECTOR": config.vector}
        num_extras = 0 if extras is None else extras.shape[1]
        has_labels = has_ce or (num_extras > 1 and labels is not None)
        of_passes |= {"extras_ptr": extras, "EXTRAS": num_extras, "HAS_LABELS": has_labels}
    if kernel is not _kd_loss_fwd_kernel:  # 3
        row_weights, *_, dlogits = others
        of_passes |= {"stride_wm": row_weights.stride(0), "stride_dm": dlogits.stride(0)}
        of_passes |= {"kd_weight": spec.kd_weight, "ce_weight": spec.ce_weight}
        of_passes |= {"z_loss_weight": spec.z_loss_weight, "HAS_Z": spec.z_loss_weight != 0.0}
    with torch.cuda.device_of(student_logits):
        kernel[(rows,)](
            *(student_logits, teacher_logits, spec.student_bias, spec.teacher_bias),
            *(labels, spec.softening, *others),
            V=vocab_size,
            stride_sm=student_logits.stride(0),
            stride_tm=teacher_logits.stride(0),
            stride_lm=0 if labels is None else labels.stride(0),
            smoothing=spec.label_smoothing,
            HAS_CE=has_ce,
            SMOOTHS=has_ce and spec.label_smoothing != 0.0,
            ROW_SUMS=spec.record.row_sums,
            BLOCK_V=config.block_v,
            BEND_S=bend_constants(spec.student_bend),
            BEND_T=bend_constants(spec.teacher_bend),
            num_warps=config.num_warps,
            enable_fp_fusion=True,  # said because the default differs between Triton releases
            **_spec_args(spec),
            **of_passes,
        )


def _spec_args(spec: KDSpec) -> dict[str, Any]:
    """What every kernel takes of a spec; of a weighted sum c0 holds the numbers of all parts."""
    numbers = [(weight, *_constants(record, spec)) for record, weight in spec.parts]
    names: tuple[str, ...] = tuple(record.name for record, _ in spec.parts)
    of_first: tuple[Any, ...] = numbers[0][1:]
    if len(names) > 1:
        of_first = tuple(number for part in numbers for number in part), 0.0, 0.0, 0.0
    c0, c1, c2, c3 = of_first
    return {
        "scale": math.log2(math.e) / spec.temperature,
        "inv_temperature": 1.0 / spec.temperature,
        "c0": c0,
        "c1": c1,
        "c2": c2,
        "c3": c3,
        "DIVERGENCE": names if len(names) > 1 else names[0],
        "PARTS": len(names),
        "UNIT_TEMPERATURE": spec.softening is None and spec.temperature == 1.0,
    }


def _constants(record: Divergence, spec: KDSpec) -> tuple[float, float, float, float]:
    """Those of the record, in logarithms of base 2 and of twice a weight."""
    c0, c1, c2, c3 = record.kernel_constants(*record.parameters(spec.alpha, spec.beta))
    if record.mixes is not None:
        c2, c3 = (log / math.log(2.0) + 1.0 for log in (c2, c3))
    return c0, c1, c2, c3

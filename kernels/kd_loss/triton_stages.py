"""The stages of stages.py, one program per row of a rank's classes.

The passes are those of triton_impl.py, each in a kernel of its own: between two of them the ranks
tell each other what they found.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from modxfer_fast.kernels.common import KDSpec
from modxfer_fast.kernels.kd_loss.config import RowConfig, row_config
from modxfer_fast.kernels.kd_loss.stages import MORE, PART
from modxfer_fast.kernels.kd_loss.triton_bend import bend_constants, unbend
from modxfer_fast.kernels.kd_loss.triton_cross_entropy import add_hard_dlogits
from modxfer_fast.kernels.kd_loss.triton_divergences import LN2, class_terms, probabilities
from modxfer_fast.kernels.kd_loss.triton_impl import _row_softening, _spec_args
from modxfer_fast.kernels.kd_loss.triton_of_logits import (
    load_of_logits,
    of_logits_terms,
    store_logit_parts,
)
from modxfer_fast.kernels.kd_loss.triton_of_row import of_row_parts, of_row_terms
from modxfer_fast.kernels.kd_loss.triton_softmax import (
    LOG2E,
    load_bent,
    load_classes,
    softmax_stats,
)


@triton.jit
def _local_label(labels_ptr, row, stride_lm, HAS_LABELS: tl.constexpr):
    """In [0, V), V for a class of another rank, -1 for none."""
    label = -1
    if HAS_LABELS:
        label = tl.load(labels_ptr + row * stride_lm).to(tl.int32)
    return label


@triton.jit
def _kd_loss_stats_kernel(
    student_ptr, teacher_ptr,            # in   [M, V]
    bias_s_ptr, bias_t_ptr,              # in   [V], or None
    labels_ptr,                          # in   [M], int64
    softening_ptr,                       # in   [M, 2], fp32, or None
    parts_ptr,                           # out  [M, WIDTH], fp32
    V,
    stride_sm, stride_tm, stride_lm,     # strides, in elements
    scale, inv_temperature,
    ROW_SUMS: tl.constexpr, SMOOTHS: tl.constexpr, HAS_MORE: tl.constexpr,
    HAS_LABELS: tl.constexpr, UNIT_TEMPERATURE: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_V: tl.constexpr, VECTOR: tl.constexpr, BEND_S: tl.constexpr, BEND_T: tl.constexpr,
):  # fmt: skip
    # M * V passes 2^31 with a large vocabulary: widen before multiplying by a stride
    row = tl.program_id(0).to(tl.int64)
    student = (student_ptr + row * stride_sm, bias_s_ptr)
    teacher = (teacher_ptr + row * stride_tm, bias_t_ptr)
    label = _local_label(labels_ptr, row, stride_lm, HAS_LABELS)
    scale, inv_temperature, _ = _row_softening(softening_ptr, row, scale, inv_temperature, 1.0)
    max_s, d_s, max_t, d_t, d_1, mean, mean_x, mean_x_s, mean_x_t, shares_top = softmax_stats(
        student, teacher, V, scale, inv_temperature, ROW_SUMS,
        not UNIT_TEMPERATURE, SMOOTHS, HAS_MORE, BLOCK_V, VECTOR, BEND_S, BEND_T,
    )  # fmt: skip
    z_label = 0.0
    if HAS_LABELS:
        is_here = (label >= 0) & (label < V)
        z_label = load_classes(student, label, is_here, 0.0, BEND_S)
    parts_ptr += row * WIDTH
    tl.store(parts_ptr + 0, max_s)
    tl.store(parts_ptr + 1, d_s)
    tl.store(parts_ptr + 2, max_t)
    tl.store(parts_ptr + 3, d_t)
    tl.store(parts_ptr + 4, d_1)
    tl.store(parts_ptr + 5, mean)
    tl.store(parts_ptr + 6, mean_x)
    tl.store(parts_ptr + 7, z_label)
    if HAS_MORE:
        tl.store(parts_ptr + 8, mean_x_s)
        tl.store(parts_ptr + 9, mean_x_t)
        tl.store(parts_ptr + 10, shares_top)


@triton.jit
def _kd_loss_sums_kernel(
    student_ptr, teacher_ptr,            # in   [M, V]
    bias_s_ptr, bias_t_ptr,              # in   [V], or None
    softening_ptr,                       # in   [M, 2], fp32, or None
    stats_ptr,                           # in   [M, 6], fp32
    sums_ptr,                            # out  [M, 2], or [M, num_sums] of an `OfRow`, fp32
    V,
    stride_sm, stride_tm,
    scale, inv_temperature, c0, c1, c2, c3,
    DIVERGENCE: tl.constexpr, PARTS: tl.constexpr, ROW_SUMS: tl.constexpr,
    BLOCK_V: tl.constexpr, VECTOR: tl.constexpr, BEND_S: tl.constexpr, BEND_T: tl.constexpr,
):  # fmt: skip
    """Every lane, the owner of VECTOR neighbouring columns, has sums of its own.

    With sums of single columns, as in the fused kernel, LLVM of Triton 3.9 crashes where the
    statistics are read from memory.
    """
    row = tl.program_id(0).to(tl.int64)
    student = (student_ptr + row * stride_sm, bias_s_ptr)
    teacher = (teacher_ptr + row * stride_tm, bias_t_ptr)
    scale, inv_temperature, _ = _row_softening(softening_ptr, row, scale, inv_temperature, 1.0)
    stats_ptr += row * 6
    max_s = tl.load(stats_ptr + 0)
    logd_s = tl.load(stats_ptr + 1)
    max_t = tl.load(stats_ptr + 2)
    logd_t = tl.load(stats_ptr + 3)
    if ROW_SUMS == "of_row":
        log2_s, first, second, variation, signed = of_row_parts(
            student, teacher, V, max_s, logd_s, max_t, logd_t, scale, c0,
            DIVERGENCE, BLOCK_V, BEND_S, BEND_T,
        )  # fmt: skip
        if DIVERGENCE == "negative_log_acceptance":
            first *= LN2
        sums_ptr += row * 5
        tl.store(sums_ptr + 0, log2_s * LN2)
        tl.store(sums_ptr + 1, first)
        tl.store(sums_ptr + 2, second)
        tl.store(sums_ptr + 3, variation)
        tl.store(sums_ptr + 4, signed)
    elif ROW_SUMS == "of_logits":
        sums_ptr += row * (2 if DIVERGENCE == "logits_mse" else 3)
        store_logit_parts(
            sums_ptr, student, teacher, V, inv_temperature,
            DIVERGENCE, BLOCK_V, BEND_S, BEND_T,
        )  # fmt: skip
    else:
        LANES: tl.constexpr = BLOCK_V // VECTOR
        f_sum = tl.zeros([LANES], tl.float32)
        u_sum = tl.zeros([LANES], tl.float32)
        offs_lane = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
        for i in range(tl.cdiv(V, BLOCK_V)):
            offs_v = i * BLOCK_V + offs_lane
            z_s = load_bent(student, offs_v, V, BEND_S)
            z_t = load_bent(teacher, offs_v, V, BEND_T)
            p, q, d, log2_p, log2_q = probabilities(z_s, z_t, max_s, logd_s, max_t, logd_t, scale)
            f, u = class_terms(p, q, d, log2_p, log2_q, c0, c1, c2, c3, DIVERGENCE, PARTS)
            f_sum += tl.sum(f, axis=1)
            u_sum += tl.sum(u, axis=1)
        tl.store(sums_ptr + row * 2, tl.sum(f_sum, axis=0))
        tl.store(sums_ptr + row * 2 + 1, tl.sum(u_sum, axis=0))


@triton.jit
def _kd_loss_write_kernel(
    student_ptr, teacher_ptr,            # in   [M, V]
    bias_s_ptr, bias_t_ptr,              # in   [V], or None
    labels_ptr,                          # in   [M], int64
    softening_ptr,                       # in   [M, 2], fp32, or None
    row_weights_ptr,                     # in   [M], fp32
    stats_ptr,                           # in   [M, 6 + num_numbers], fp32
    dlogits_ptr,                         # out  [M, V]
    V, classes,
    stride_sm, stride_tm, stride_lm, stride_wm, stride_am, stride_dm,
    kd_weight, ce_weight, smoothing, z_loss_weight,
    scale, inv_temperature, c0, c1, c2, c3,
    DIVERGENCE: tl.constexpr, PARTS: tl.constexpr, HAS_CE: tl.constexpr, SMOOTHS: tl.constexpr,
    HAS_Z: tl.constexpr, ROW_SUMS: tl.constexpr, BLOCK_V: tl.constexpr,
    BEND_S: tl.constexpr, BEND_T: tl.constexpr,
):  # fmt: skip
    """Pass 3 of triton_impl.py, left to right; other ranks have more classes of a row.

    That changes its label and what label smoothing divides by.
    """
    row = tl.program_id(0).to(tl.int64)
    student = (student_ptr + row * stride_sm, bias_s_ptr)
    teacher = (teacher_ptr + row * stride_tm, bias_t_ptr)
    dlogits_ptr += row * stride_dm
    label = _local_label(labels_ptr, row, stride_lm, HAS_CE)
    row_weight = tl.load(row_weights_ptr + row * stride_wm)
    scale, inv_temperature, kd_weight = _row_softening(
        softening_ptr, row, scale, inv_temperature, kd_weight
    )
    stats_ptr += row * stride_am
    max_s = tl.load(stats_ptr + 0)
    logd_s = tl.load(stats_ptr + 1)
    max_t = tl.load(stats_ptr + 2)
    logd_t = tl.load(stats_ptr + 3)
    u_sum = tl.load(stats_ptr + 4)
    logd_1 = tl.load(stats_ptr + 5)
    slope = 1.0
    log2_s = 0.0
    if ROW_SUMS == "of_row":
        slope = tl.load(stats_ptr + 6)
        log2_s = tl.load(stats_ptr + 7) * LOG2E
    if ROW_SUMS == "of_logits":
        of_logits = load_of_logits(stats_ptr + 6, inv_temperature, DIVERGENCE)
    counts = row_weight != 0  # an ignored row may hold anything and is not read
    kd_factor = row_weight * kd_weight * inv_temperature
    ce_factor = tl.where(label >= 0, row_weight * ce_weight, 0.0)
    q_1_factor = ce_factor
    if HAS_Z:
        q_1_factor += 2.0 * row_weight * z_loss_weight * (max_s + logd_1)
    for i in range(tl.cdiv(V, BLOCK_V)):
        offs_v = i * BLOCK_V + tl.arange(0, BLOCK_V)
        of_row = tl.where(counts, V, 0)
        z_s = load_bent(student, offs_v, of_row, BEND_S)
        z_t = load_bent(teacher, offs_v, of_row, BEND_T)
        p, q, d, log2_p, log2_q = probabilities(z_s, z_t, max_s, logd_s, max_t, logd_t, scale)
        if ROW_SUMS == "of_row":
            u = of_row_terms(p, q, d, log2_p, log2_q, c0, slope, log2_s, DIVERGENCE)
        elif ROW_SUMS == "of_logits":
            u = of_logits_terms(z_s, z_t, of_logits)
        else:
            _, u = class_terms(p, q, d, log2_p, log2_q, c0, c1, c2, c3, DIVERGENCE, PARTS)
        dlogits = kd_factor * (u - q * u_sum)
        if HAS_CE or HAS_Z:
            # at temperature 1 too, where q may be of some of the classes
            q_1 = tl.exp2((z_s - max_s - logd_1) * LOG2E)
            dlogits = add_hard_dlogits(
                dlogits, q_1, offs_v == label, q_1_factor, ce_factor, smoothing, classes,
                HAS_CE, SMOOTHS, HAS_Z,
            )  # fmt: skip
        dlogits = tl.where(counts, unbend(dlogits, z_s, BEND_S), 0.0)
        # without this barrier one warp may overwrite logits that another has yet to load
        tl.debug_barrier()
        tl.store(dlogits_ptr + offs_v, dlogits.to(dlogits_ptr.dtype.element_ty), mask=offs_v < V)


def kd_loss_stats(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None,
    spec: KDSpec,
    has_more: bool,
) -> Tensor:
    width = len(PART) + has_more * len(MORE)
    parts = student_logits.new_empty(len(student_logits), width, dtype=torch.float32)
    config = _config(student_logits, teacher_logits)
    args: dict[str, Any] = _spec_args(spec)
    for unread in ("c0", "c1", "c2", "c3", "DIVERGENCE", "PARTS"):
        del args[unread]
    has_ce = labels is not None and spec.ce_weight != 0.0
    _launch(
        *(_kd_loss_stats_kernel, config, student_logits, teacher_logits, spec),
        *(labels, spec.softening, parts),
        stride_lm=0 if labels is None else labels.stride(0),
        ROW_SUMS=spec.record.row_sums,
        SMOOTHS=has_ce and spec.label_smoothing != 0.0,
        HAS_MORE=has_more,
        HAS_LABELS=labels is not None,
        WIDTH=width,
        VECTOR=config.vector,
        **args,
    )
    return parts


def kd_loss_sums(
    student_logits: Tensor, teacher_logits: Tensor, stats: Tensor, spec: KDSpec
) -> Tensor:
    whole = spec.record.whole
    sums = stats.new_empty(len(stats), 2 if whole is None else whole.num_sums)
    config = _config(student_logits, teacher_logits)
    args: dict[str, Any] = _spec_args(spec)
    del args["UNIT_TEMPERATURE"]
    _launch(
        *(_kd_loss_sums_kernel, config, student_logits, teacher_logits, spec),
        *(spec.softening, stats, sums),
        ROW_SUMS=spec.record.row_sums,
        VECTOR=config.vector,
        **args,
    )
    return sums


def kd_loss_write(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None,
    classes: int,
    row_weights: Tensor,
    stats: Tensor,
    spec: KDSpec,
    dlogits: Tensor,
) -> None:
    """Writes dlogits as `triton_impl.kd_loss_bwd` does, over the logits too."""
    has_ce = labels is not None and spec.ce_weight != 0.0
    config = _config(student_logits, teacher_logits)
    args: dict[str, Any] = _spec_args(spec)
    del args["UNIT_TEMPERATURE"]
    _launch(
        *(_kd_loss_write_kernel, config, student_logits, teacher_logits, spec),
        *(labels, spec.softening, row_weights, stats, dlogits),
        classes=classes,
        stride_lm=0 if labels is None else labels.stride(0),
        stride_wm=row_weights.stride(0),
        stride_am=stats.stride(0),
        stride_dm=dlogits.stride(0),
        ROW_SUMS=spec.record.row_sums,
        kd_weight=spec.kd_weight,
        ce_weight=spec.ce_weight,
        smoothing=spec.label_smoothing,
        z_loss_weight=spec.z_loss_weight,
        HAS_CE=has_ce,
        SMOOTHS=has_ce and spec.label_smoothing != 0.0,
        HAS_Z=spec.z_loss_weight != 0.0,
        **args,
    )


def _config(student_logits: Tensor, teacher_logits: Tensor) -> RowConfig:
    rows, vocab_size = student_logits.shape
    dtypes = (student_logits.dtype, teacher_logits.dtype)
    return row_config(vocab_size, rows, dtypes, warp_size=64 if torch.version.hip else 32)


def _launch(
    kernel: triton.JITFunction,
    config: RowConfig,
    student_logits: Tensor,
    teacher_logits: Tensor,
    spec: KDSpec,
    *others: Tensor | None,
    **options: Any,
) -> None:
    """A program for each row; others: the kernel's other tensors."""
    rows, vocab_size = student_logits.shape
    if rows == 0:
        return
    with torch.cuda.device_of(student_logits):
        kernel[(rows,)](
            *(student_logits, teacher_logits, spec.student_bias, spec.teacher_bias, *others),
            V=vocab_size,
            stride_sm=student_logits.stride(0),
            stride_tm=teacher_logits.stride(0),
            BLOCK_V=config.block_v,
            BEND_S=bend_constants(spec.student_bend),
            BEND_T=bend_constants(spec.teacher_bend),
            num_warps=config.num_warps,
            enable_fp_fusion=True,  # said because the default differs between Triton releases
            **options,
        )

"""KD loss of rows of logits against a teacher that lists K classes, one program per row.

M rows   V classes   K listed, BLOCK_K - 1 at most   formulas in topk.py

    0  the K logits, ids and log-probabilities, kept in registers
    1  maximum and denominator of the classes that are not listed, "the others", online
    2  f and u of the K classes and, one place behind them, of the tail
    3  sum f and sum u of the others; of tail "renormalise"
    4  dlogits of the others, left to right, then of the K classes

Which class is listed is a bit of a word in `listed_ptr`, made by torch before the launch: V / 8
bytes a row, 1/32 of the logits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from modxfer_fast.kernels.common import KDSpec
from modxfer_fast.kernels.kd_loss.config import row_config
from modxfer_fast.kernels.kd_loss.topk import ROUNDING, TopKRows
from modxfer_fast.kernels.kd_loss.triton_bend import bend_constants, unbend
from modxfer_fast.kernels.kd_loss.triton_cross_entropy import add_hard_dlogits
from modxfer_fast.kernels.kd_loss.triton_divergences import class_terms
from modxfer_fast.kernels.kd_loss.triton_impl import (
    _load_label,
    _row_outputs,
    _row_softening,
    _spec_args,
)
from modxfer_fast.kernels.kd_loss.triton_of_row import of_list
from modxfer_fast.kernels.kd_loss.triton_softmax import LOG2E, NO_MAX, load_bent, load_classes

_WORD = 32
P_ROUNDING = tl.constexpr(ROUNDING)


@triton.jit
def _load_others(row, listed_ptr, offs_v, V, BEND: tl.constexpr):
    """fp32 logits as the model gives them, and which classes are others; -inf at those that are not
    and past the row."""
    z = load_bent(row, offs_v, V, BEND)
    word = tl.load(listed_ptr + offs_v // 32, mask=offs_v < V, other=0)
    is_listed = (word >> (offs_v % 32)) & 1 != 0
    return tl.where(is_listed, -float("inf"), z), (offs_v < V) & (is_listed == 0)


@triton.jit
def _others_stats(
    student, listed_ptr,                 # in   [V] as of load_classes, [V / 32]
    V, scale,                            # scale = log2(e) / temperature
    NEEDS_D_1: tl.constexpr, SMOOTHS: tl.constexpr,
    BLOCK_V: tl.constexpr, VECTOR: tl.constexpr, BEND: tl.constexpr,
):  # fmt: skip
    """Pass 1: (max, d, d_1) of the others, every lane for itself; and where it smooths, the sum of
    z - max.

    Right to left: the next pass begins with the tiles that this one leaves in the cache.
    """
    LANES: tl.constexpr = BLOCK_V // VECTOR
    m = tl.full([LANES], NO_MAX, tl.float32)
    d = tl.zeros([LANES], tl.float32)
    d_1 = tl.zeros([LANES], tl.float32)
    x_sum = tl.zeros([LANES], tl.float32)
    count = tl.zeros([LANES], tl.float32)
    offs_lane = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    num_tiles = tl.cdiv(V, BLOCK_V)
    for i in range(num_tiles):
        offs_v = (num_tiles - 1 - i) * BLOCK_V + offs_lane
        z, is_other = _load_others(student, listed_ptr, offs_v, V, BEND)
        m_new = tl.maximum(m, tl.max(z, axis=1))
        rise = m_new - m
        x = z - m_new[:, None]
        if NEEDS_D_1:
            d_1 = d_1 * tl.exp2(-rise * LOG2E) + tl.sum(tl.exp2(x * LOG2E), axis=1)
        if SMOOTHS:
            x_sum += tl.sum(tl.where(is_other, x, 0.0), axis=1) - rise * count
            count += tl.sum(tl.where(is_other, 1.0, 0.0), axis=1)
        d = d * tl.exp2(-rise * scale) + tl.sum(tl.exp2(x * scale), axis=1)
        m = m_new
    top = tl.max(m, axis=0)
    rise = top - m
    sum_d = tl.sum(d * tl.exp2(-rise * scale), axis=0)
    sum_1 = sum_d
    if NEEDS_D_1:
        sum_1 = tl.sum(d_1 * tl.exp2(-rise * LOG2E), axis=0)
    return top, sum_d, sum_1, tl.sum(x_sum - rise * count, axis=0)


@triton.jit
def _topk_kd_loss_kernel(
    student_ptr, bias_ptr,               # in   [M, V], [V] or None
    ids_ptr, log_p_ptr, log_tail_ptr,    # in   [M, K], [M, K], [M]; fp32
    listed_ptr,                          # in   [M, W], int32, a bit a class
    labels_ptr, row_weights_ptr,         # in   [M]; int64, fp32
    softening_ptr,                       # in   [M, 2], fp32, or None
    kd_ptr, ce_ptr,                      # out  [M], fp32
    lse_ptr,                             # out  [M, 1], fp32, or None
    dlogits_ptr,                         # out  [M, V]
    V, K,
    stride_sm, stride_bm, stride_lm, stride_wm, stride_dm,
    kd_weight, ce_weight, smoothing, z_loss_weight, missing,
    scale, inv_temperature, c0, c1, c2, c3,
    DIVERGENCE: tl.constexpr, PARTS: tl.constexpr, ROW_SUMS: tl.constexpr, HAS_CE: tl.constexpr,
    SMOOTHS: tl.constexpr, HAS_Z: tl.constexpr, HAS_LSE: tl.constexpr,
    UNIT_TEMPERATURE: tl.constexpr, TAIL: tl.constexpr, HAS_GRADIENT: tl.constexpr,
    BLOCK_V: tl.constexpr, VECTOR: tl.constexpr, BLOCK_K: tl.constexpr, BEND: tl.constexpr,
):  # fmt: skip
    # M * V passes 2^31 with a large vocabulary: widen before multiplying by a stride
    row = tl.program_id(0).to(tl.int64)
    student = (student_ptr + row * stride_sm, bias_ptr)
    listed_ptr += row * stride_bm
    label = _load_label(labels_ptr, row, stride_lm, V, HAS_CE)
    scale, inv_temperature, kd_weight = _row_softening(
        softening_ptr, row, scale, inv_temperature, kd_weight
    )
    z_label = 0.0
    if HAS_CE:
        z_label = load_classes(student, label, label >= 0, 0.0, BEND)

    offs_k = tl.arange(0, BLOCK_K)
    ids = tl.load(ids_ptr + row * K + offs_k, mask=offs_k < K, other=-1)
    is_listed = (ids >= 0) & (ids < V)
    ids = tl.where(is_listed, ids, -1).to(tl.int32)
    z_k = load_classes(student, ids, is_listed, -float("inf"), BEND)
    log2_p = tl.load(log_p_ptr + row * K + offs_k, mask=is_listed, other=-float("inf")) * LOG2E

    NEEDS_D_1: tl.constexpr = (HAS_CE or HAS_Z or HAS_LSE) and not UNIT_TEMPERATURE
    max_o, d_o, d_o1, x_sum = _others_stats(
        student, listed_ptr, V, scale, NEEDS_D_1, SMOOTHS, BLOCK_V, VECTOR, BEND
    )  # fmt: skip
    num_listed = tl.sum(is_listed.to(tl.int32), axis=0)
    max_all = tl.maximum(max_o, tl.max(z_k, axis=0))
    below = max_o - max_all
    x_k = z_k - max_all
    logd = tl.log(d_o * tl.exp2(below * scale) + tl.sum(tl.exp2(x_k * scale), axis=0))
    logd_1 = logd
    if NEEDS_D_1:
        logd_1 = tl.log(d_o1 * tl.exp2(below * LOG2E) + tl.sum(tl.exp2(x_k * LOG2E), axis=0))
    ce = 0.0
    if HAS_CE:
        ce = tl.where(label >= 0, logd_1 - (z_label - max_all), 0.0)
        if SMOOTHS:
            x_sum += (V - num_listed) * below + tl.sum(tl.where(is_listed, x_k, 0.0), axis=0)
            ce += tl.where(label >= 0, smoothing * ((logd_1 - x_sum / V) - ce), 0.0)
    tl.store(ce_ptr + row, ce)
    if HAS_LSE:
        tl.store(lse_ptr + row, max_all + logd_1)

    log2_q = x_k * scale - logd * LOG2E
    if TAIL == "bucket":
        log2_tail = tl.load(log_tail_ptr + row) * LOG2E
        # nothing of the student's is left, and of the teacher's no more than rounding
        is_rounding = (num_listed == V) | (tl.exp2(log2_tail) < P_ROUNDING)
        log2_tail = tl.where((d_o == 0) & is_rounding, -float("inf"), log2_tail)
        log2_q_tail = below * scale + (tl.log(d_o) - logd) * LOG2E
        log2_q = tl.where(offs_k == K, log2_q_tail, log2_q)
        log2_p = tl.where(offs_k == K, log2_tail, log2_p)
    q_k = tl.exp2(log2_q)
    p_k = tl.exp2(log2_p)
    d_k = log2_p - log2_q
    if ROW_SUMS == "of_row":
        kd, u_k = of_list(p_k, q_k, d_k, log2_p, log2_q, c0, c1, DIVERGENCE)
    else:
        f_k, u_k = class_terms(
            p_k, q_k, d_k, log2_p, log2_q, c0, c1, c2, c3, DIVERGENCE, PARTS
        )  # fmt: skip
        if TAIL == "none":
            u_k += missing * q_k
        kd = tl.sum(f_k, axis=0)
    u_sum = tl.sum(u_k, axis=0)
    # q of the others is exp2(z scale) times this
    share = tl.exp2(below * scale - logd * LOG2E)

    if TAIL == "renormalise":
        f_sum = tl.zeros([BLOCK_V], tl.float32)
        u_others = tl.zeros([BLOCK_V], tl.float32)
        for i in range(tl.cdiv(V, BLOCK_V)):
            offs_v = i * BLOCK_V + tl.arange(0, BLOCK_V)
            z, _ = _load_others(student, listed_ptr, offs_v, V, BEND)
            q = tl.exp2((z - max_o) * scale) * share
            zeros = tl.zeros([BLOCK_V], tl.float32)
            f, u = class_terms(
                zeros, q, zeros - float("inf"), zeros - float("inf"), tl.log2(q),
                c0, c1, c2, c3, DIVERGENCE, PARTS,
            )  # fmt: skip
            f_sum += f
            u_others += u
        kd += tl.sum(f_sum, axis=0)
        u_sum += tl.sum(u_others, axis=0)
    tl.store(kd_ptr + row, kd)
    if TAIL != "none" and ROW_SUMS == "mean_under_p":
        u_sum = -1.0

    if HAS_GRADIENT:
        row_weight = tl.load(row_weights_ptr + row * stride_wm)
        dlogits_ptr += row * stride_dm
        # all warps have read what they read of the row before one of them may write over it
        tl.debug_barrier()
        if row_weight == 0:
            # an ignored row may hold anything
            for i in range(tl.cdiv(V, BLOCK_V)):
                offs_v = i * BLOCK_V + tl.arange(0, BLOCK_V)
                zeros = tl.zeros([BLOCK_V], dlogits_ptr.dtype.element_ty)
                tl.store(dlogits_ptr + offs_v, zeros, mask=offs_v < V)
        else:
            kd_factor = row_weight * kd_weight * inv_temperature
            ce_factor = tl.where(label >= 0, row_weight * ce_weight, 0.0)
            q_1_factor = ce_factor
            if HAS_Z:
                q_1_factor += 2.0 * row_weight * z_loss_weight * (max_all + logd_1)
            of_others = -u_sum * share
            if TAIL == "bucket":
                u_tail = tl.sum(tl.where(offs_k == K, u_k, 0.0), axis=0)
                of_others += tl.where(d_o == 0, 0.0, u_tail / d_o)
            for i in range(tl.cdiv(V, BLOCK_V)):
                offs_v = i * BLOCK_V + tl.arange(0, BLOCK_V)
                z, _ = _load_others(student, listed_ptr, offs_v, V, BEND)
                e = tl.exp2((z - max_o) * scale)
                dz = e * of_others
                if TAIL == "renormalise":
                    zeros = tl.zeros([BLOCK_V], tl.float32)
                    _, u = class_terms(
                        zeros, e * share, zeros - float("inf"), zeros - float("inf"),
                        tl.log2(e * share),
                        c0, c1, c2, c3, DIVERGENCE, PARTS,
                    )  # fmt: skip
                    dz += u
                dz = kd_factor * dz
                if HAS_CE or HAS_Z:
                    q_1 = e * share
                    if not UNIT_TEMPERATURE:
                        q_1 = tl.exp2((z - max_all - logd_1) * LOG2E)
                    dz = add_hard_dlogits(
                        dz, q_1, offs_v == label, q_1_factor, ce_factor, smoothing, V,
                        HAS_CE, SMOOTHS, HAS_Z,
                    )  # fmt: skip
                dz = unbend(dz, z, BEND)
                # one warp may not overwrite logits that another has yet to load
                tl.debug_barrier()
                tl.store(dlogits_ptr + offs_v, dz.to(dlogits_ptr.dtype.element_ty), mask=offs_v < V)
            dz_k = kd_factor * (u_k - q_k * u_sum)
            if HAS_CE or HAS_Z:
                q_1k = q_k
                if not UNIT_TEMPERATURE:
                    q_1k = tl.exp2((x_k - logd_1) * LOG2E)
                dz_k = add_hard_dlogits(
                    dz_k, q_1k, ids == label, q_1_factor, ce_factor, smoothing, V,
                    HAS_CE, SMOOTHS, HAS_Z,
                )  # fmt: skip
            dz_k = unbend(dz_k, z_k, BEND)
            # behind what the loop has stored there
            tl.debug_barrier()
            tl.store(dlogits_ptr + ids, dz_k.to(dlogits_ptr.dtype.element_ty), mask=is_listed)


def topk_kd_loss_fwd(
    student_logits: Tensor,
    teacher: TopKRows,
    labels: Tensor | None,
    spec: KDSpec,
    extras: Tensor | None = None,
) -> tuple[Tensor, Tensor, None]:
    """Per-row losses kd, ce [M] fp32, unweighted; student_logits [M, V], last stride 1.

    Args:
        extras: [M, 1], written where given: log sum exp of the student's logits.
    """
    return *_launch(student_logits, teacher, labels, None, spec, None, extras), None


def topk_kd_loss_fwd_bwd(
    student_logits: Tensor,
    teacher: TopKRows,
    labels: Tensor | None,
    row_weights: Tensor,
    spec: KDSpec,
    dlogits: Tensor,
    extras: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns kd, ce and writes dlogits as `triton_impl.kd_loss_bwd` does, over the logits too."""
    return _launch(student_logits, teacher, labels, row_weights, spec, dlogits, extras)


def _launch(
    student_logits: Tensor,
    teacher: TopKRows,
    labels: Tensor | None,
    row_weights: Tensor | None,
    spec: KDSpec,
    dlogits: Tensor | None,
    extras: Tensor | None,
) -> tuple[Tensor, Tensor]:
    kd, ce = _row_outputs(student_logits)
    rows, vocab_size = student_logits.shape
    if rows == 0:
        return kd, ce
    config = row_config(
        vocab_size, rows, (student_logits.dtype,), warp_size=64 if torch.version.hip else 32
    )
    listed = _listed(teacher.ids, vocab_size)
    num_listed = teacher.ids.shape[1]
    has_ce = labels is not None and spec.ce_weight != 0.0
    with torch.cuda.device_of(student_logits):
        _topk_kd_loss_kernel[(rows,)](
            student_logits,
            spec.student_bias,
            teacher.ids.contiguous(),
            teacher.log_probs.contiguous(),
            teacher.log_tail,
            listed,
            labels,
            row_weights,
            spec.softening,
            kd,
            ce,
            extras,
            dlogits,
            V=vocab_size,
            K=num_listed,
            stride_sm=student_logits.stride(0),
            stride_bm=listed.stride(0),
            stride_lm=0 if labels is None else labels.stride(0),
            stride_wm=0 if row_weights is None else row_weights.stride(0),
            stride_dm=0 if dlogits is None else dlogits.stride(0),
            kd_weight=spec.kd_weight,
            ce_weight=spec.ce_weight,
            smoothing=spec.label_smoothing,
            z_loss_weight=spec.z_loss_weight,
            missing=teacher.missing,
            HAS_CE=has_ce,
            SMOOTHS=has_ce and spec.label_smoothing != 0.0,
            HAS_Z=spec.z_loss_weight != 0.0,
            HAS_LSE=extras is not None,
            TAIL=teacher.tail,
            HAS_GRADIENT=dlogits is not None,
            BLOCK_V=config.block_v,
            VECTOR=config.vector,
            BLOCK_K=triton.next_power_of_2(num_listed + 1),  # the tail is behind the last
            num_warps=config.num_warps,
            # said here because the default differs between Triton releases
            enable_fp_fusion=True,
            ROW_SUMS=spec.record.row_sums,
            **_spec_args(spec),
            BEND=bend_constants(spec.student_bend),
        )
    return kd, ce


def _listed(ids: Tensor, vocab_size: int) -> Tensor:
    """[M, W] int32, whose bit j of word w says that class 32 w + j is listed."""
    absent = -(-vocab_size // _WORD) * _WORD  # in a word of its own, of which nothing is read
    width = absent // _WORD + 1
    safe = torch.where((ids >= 0) & (ids < vocab_size), ids, absent).long()
    words = torch.zeros(ids.shape[0] * width, dtype=torch.int32, device=ids.device)
    starts = torch.arange(0, len(words), width, device=ids.device)[:, None]
    # a sum of different bits is their union; flat, because torch sums these in a fixed order
    bits = torch.ones_like(safe, dtype=torch.int32) << (safe % _WORD).int()
    words.scatter_add_(0, (starts + safe // _WORD).flatten(), bits.flatten())
    return words.view(-1, width)

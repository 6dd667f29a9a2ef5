"""Cross entropy of rows of logits, one program per row; probabilities are never stored.

M rows   V classes   z logits, biased and bent as they are loaded   q softmax   s label smoothing
lse = log sum e^z

Passes over the row:

    1  maximum and denominator, online; sum of z where it is smoothed, sum q log q where asked for
    2  dlogits = row_weight ((ce_weight + 2 z_loss_weight lse) q
                             - ce_weight ((1 - s) onehot + s / V))

The first runs right to left, so that the second begins with the tiles left in the cache; that one
runs left to right, because dlogits may lie over the logits with half their width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from modxfer_fast.kernels.common import KDSpec
from modxfer_fast.kernels.kd_loss.config import row_config
from modxfer_fast.kernels.kd_loss.triton_bend import bend_constants, unbend
from modxfer_fast.kernels.kd_loss.triton_softmax import LOG2E, NO_MAX, load_bent, load_classes


@triton.jit
def add_hard_dlogits(
    dlogits, q_1, is_label, of_q, of_label, smoothing, classes,
    HAS_CE: tl.constexpr, SMOOTHS: tl.constexpr, HAS_Z: tl.constexpr,
):  # fmt: skip
    """dlogits of a divergence and those of the terms of temperature 1, of which q_1 is a softmax.

    of_label is a row's weight of the cross entropy; of_q that of q_1 from it and from the z-loss.
    """
    if not SMOOTHS and not HAS_Z:
        dlogits += of_label * tl.where(is_label, q_1 - 1.0, q_1)
    else:
        dlogits += of_q * q_1
        if SMOOTHS:
            dlogits -= of_label * smoothing / classes
        if HAS_CE:
            dlogits = tl.where(is_label, dlogits - of_label * (1.0 - smoothing), dlogits)
    return dlogits


@triton.jit
def _row_sums(
    logits,                              # in   [V], as of load_classes
    V,
    SMOOTHS: tl.constexpr, HAS_ENTROPY: tl.constexpr,
    BLOCK_V: tl.constexpr, VECTOR: tl.constexpr, BEND: tl.constexpr,
):  # fmt: skip
    """Pass 1: max, d = sum e^x, mean of x, mean of x under q, x = z - max; means 0 unless asked.

    Every lane, the owner of VECTOR neighbouring columns, keeps sums of its own until the end.
    """
    LANES: tl.constexpr = BLOCK_V // VECTOR
    m = tl.full([LANES], NO_MAX, tl.float32)
    d = tl.zeros([LANES], tl.float32)
    x_sum = tl.zeros([LANES], tl.float32)
    count = tl.zeros([LANES], tl.float32)
    e_x_sum = tl.zeros([LANES], tl.float32)

    offs_lane = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    num_tiles = tl.cdiv(V, BLOCK_V)
    for i in range(num_tiles):
        offs_v = (num_tiles - 1 - i) * BLOCK_V + offs_lane
        z = load_bent(logits, offs_v, V, BEND)
        m_new = tl.maximum(m, tl.max(z, axis=1))
        rise = m_new - m
        keep = tl.exp2(-rise * LOG2E)
        x = z - m_new[:, None]
        e = tl.exp2(x * LOG2E)
        if SMOOTHS:
            x_sum += tl.sum(tl.where(offs_v < V, x, 0.0), axis=1) - rise * count
            count += tl.sum(tl.where(offs_v < V, 1.0, 0.0), axis=1)
        if HAS_ENTROPY:
            moved = tl.where(keep > 0, keep * (e_x_sum - d * rise), 0.0)
            e_x_sum = moved + tl.sum(tl.where(e > 0, e * x, 0.0), axis=1)
        d = d * keep + tl.sum(e, axis=1)
        m = m_new

    max_z = tl.max(m, axis=0)
    rise = max_z - m
    keep = tl.exp2(-rise * LOG2E)
    sum_d = tl.sum(d * keep, axis=0)
    mean = 0.0
    if SMOOTHS:
        mean = tl.sum(x_sum - rise * count, axis=0) / V
    mean_under_q = 0.0
    if HAS_ENTROPY:
        moved = tl.where(keep > 0, keep * (e_x_sum - d * rise), 0.0)
        mean_under_q = tl.sum(moved, axis=0) / sum_d
    return max_z, sum_d, mean, mean_under_q


@triton.jit
def _cross_entropy_kernel(
    logits_ptr, bias_ptr,                # in   [M, V], [V] or None
    labels_ptr,                          # in   [M], int64, or None
    row_weights_ptr,                     # in   [M], fp32, or None without a gradient
    ce_ptr,                              # out  [M], fp32
    extras_ptr,                          # out  [M, EXTRAS], fp32, or None
    dlogits_ptr,                         # out  [M, V], or None
    V,
    stride_zm, stride_lm, stride_wm, stride_dm,
    ce_weight, smoothing, rest, z_loss_weight,   # rest = 1 - smoothing
    HAS_LABELS: tl.constexpr, HAS_CE: tl.constexpr, SMOOTHS: tl.constexpr, HAS_Z: tl.constexpr,
    EXTRAS: tl.constexpr, HAS_GRADIENT: tl.constexpr,
    BLOCK_V: tl.constexpr, VECTOR: tl.constexpr, BEND: tl.constexpr,
):  # fmt: skip
    # M * V passes 2^31 with a large vocabulary: widen before multiplying by a stride
    row = tl.program_id(0).to(tl.int64)
    logits = (logits_ptr + row * stride_zm, bias_ptr)
    label = -1
    if HAS_LABELS:
        raw = tl.load(labels_ptr + row * stride_lm)
        label = tl.where((raw >= 0) & (raw < V), raw, -1).to(tl.int32)
    max_z, d, mean, mean_under_q = _row_sums(
        logits, V, SMOOTHS, EXTRAS == 4, BLOCK_V, VECTOR, BEND
    )  # fmt: skip
    log_d = tl.log(d)
    z_label = load_classes(logits, label, label >= 0, 0.0, BEND)
    nll = tl.where(label >= 0, log_d - (z_label - max_z), 0.0)
    ce = 0.0
    if HAS_CE:
        ce = nll
        if SMOOTHS:
            ce = tl.where(label >= 0, rest * nll + smoothing * (log_d - mean), 0.0)
    tl.store(ce_ptr + row, ce)
    if EXTRAS > 0:
        tl.store(extras_ptr + row * EXTRAS, max_z + log_d)
    if EXTRAS == 4:
        tl.store(extras_ptr + row * EXTRAS + 1, -nll)
        is_top = (label >= 0) & (z_label == max_z)
        tl.store(extras_ptr + row * EXTRAS + 2, tl.where(is_top, 1.0, 0.0))
        tl.store(extras_ptr + row * EXTRAS + 3, log_d - mean_under_q)
    if HAS_GRADIENT:
        dlogits_ptr += row * stride_dm
        row_weight = tl.load(row_weights_ptr + row * stride_wm)
        # all warps have read the label's logit before one of them may overwrite it
        tl.debug_barrier()
        if row_weight == 0:
            # nothing is read: an ignored row may hold anything, and half of a chat batch is ignored
            for i in range(tl.cdiv(V, BLOCK_V)):
                offs_v = i * BLOCK_V + tl.arange(0, BLOCK_V)
                zeros = tl.zeros([BLOCK_V], dlogits_ptr.dtype.element_ty)
                tl.store(dlogits_ptr + offs_v, zeros, mask=offs_v < V)
        else:
            of_label = 0.0
            if HAS_CE:
                of_label = tl.where(label >= 0, row_weight * ce_weight, 0.0)
            of_q = of_label
            if HAS_Z:
                of_q += 2.0 * row_weight * z_loss_weight * (max_z + log_d)
            for i in range(tl.cdiv(V, BLOCK_V)):
                offs_v = i * BLOCK_V + tl.arange(0, BLOCK_V)
                z = load_bent(logits, offs_v, V, BEND)
                dlogits = of_q * tl.exp2((z - max_z - log_d) * LOG2E)
                if SMOOTHS:
                    dlogits -= of_label * smoothing / V
                if HAS_CE:
                    dlogits = tl.where(offs_v == label, dlogits - of_label * rest, dlogits)
                dlogits = unbend(dlogits, z, BEND)
                # without this barrier one warp may overwrite logits that another has yet to load
                tl.debug_barrier()
                tl.store(
                    dlogits_ptr + offs_v, dlogits.to(dlogits_ptr.dtype.element_ty), mask=offs_v < V
                )


def cross_entropy_fwd(
    student_logits: Tensor,
    signal: None,
    labels: Tensor | None,
    spec: KDSpec,
    extras: Tensor | None = None,
) -> tuple[Tensor, Tensor, None]:
    """(0, cross entropy, None): [M] fp32 of each row, unweighted.

    Args:
        student_logits: [M, V], last stride 1, any row stride.
        signal: of a teacher, which there is none.
        labels: [M] int64 or None.
        extras: written where given, as `reference_cross_entropy.cross_entropy_fwd` says.
    """
    ce = _launch(student_logits, labels, spec, extras, None, None)
    return torch.zeros_like(ce), ce, None


def cross_entropy_fwd_bwd(
    student_logits: Tensor,
    signal: None,
    labels: Tensor | None,
    row_weights: Tensor,
    spec: KDSpec,
    dlogits: Tensor,
    extras: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(0, cross entropy) of each row, and writes dlogits [M, V] of sum(row_weights * loss).

    Args:
        row_weights: [M] fp32; a row of weight 0 gets a row of zeros.
        dlogits: last stride 1; may be `student_logits`, or a half-precision view of its buffer in
            which every row begins where the row of logits begins.
    """
    ce = _launch(student_logits, labels, spec, extras, row_weights, dlogits)
    return torch.zeros_like(ce), ce


def _launch(
    logits: Tensor,
    labels: Tensor | None,
    spec: KDSpec,
    extras: Tensor | None,
    row_weights: Tensor | None,
    dlogits: Tensor | None,
) -> Tensor:
    """A program for each row."""
    rows, vocab_size = logits.shape
    ce = logits.new_empty(rows, dtype=torch.float32)
    if rows == 0:
        return ce
    warp_size = 64 if torch.version.hip else 32
    config = row_config(vocab_size, rows, (logits.dtype,), warp_size=warp_size)
    has_ce = labels is not None and spec.ce_weight != 0.0
    with torch.cuda.device_of(logits):
        _cross_entropy_kernel[(rows,)](
            logits,
            spec.student_bias,
            labels,
            row_weights,
            ce,
            extras,
            dlogits,
            V=vocab_size,
            stride_zm=logits.stride(0),
            stride_lm=0 if labels is None else labels.stride(0),
            stride_wm=0 if row_weights is None else row_weights.stride(0),
            stride_dm=0 if dlogits is None else dlogits.stride(0),
            ce_weight=spec.ce_weight,
            smoothing=spec.label_smoothing,
            rest=1.0 - spec.label_smoothing,
            z_loss_weight=spec.z_loss_weight,
            HAS_LABELS=labels is not None,
            HAS_CE=has_ce,
            SMOOTHS=has_ce and spec.label_smoothing != 0.0,
            HAS_Z=spec.z_loss_weight != 0.0,
            EXTRAS=0 if extras is None else extras.shape[1],
            HAS_GRADIENT=dlogits is not None,
            BLOCK_V=config.block_v,
            VECTOR=config.vector,
            BEND=bend_constants(spec.student_bend),
            num_warps=config.num_warps,
            # said here because the default differs between Triton releases
            enable_fp_fusion=True,
        )
    return ce

"""Pass 1 of the KD loss of a row: what both softmaxes need, online; see triton_impl.py."""

import math

import triton
import triton.language as tl

from modxfer_fast.kernels.kd_loss.triton_bend import bend

LOG2E = tl.constexpr(math.log2(math.e))
# Stands for the maximum of a lane that has seen only -inf: finite, so that differences are not NaN.
NO_MAX = tl.constexpr(-1e38)


@triton.jit
def load_classes(row, ids, mask, other, BEND: tl.constexpr):
    """Logits as their model gives them, fp32; `other`, bent, where mask is false.

    row: pointers to the row and to its bias, or None.
    """
    row_ptr, bias_ptr = row
    raw = tl.load(row_ptr + ids, mask=mask, other=other).to(tl.float32)
    if bias_ptr is not None:
        raw += tl.load(bias_ptr + ids, mask=mask, other=0.0).to(tl.float32)
    return bend(raw, BEND)


@triton.jit
def load_bent(row, offs_v, V, BEND: tl.constexpr):
    """A tile of a row; -inf, a class without probability, past its end."""
    return load_classes(row, offs_v, offs_v < V, -float("inf"), BEND)


@triton.jit
def _add_cross(cross, keep, d_a, rise_a, rise_b, e_a, x_a, x_b):
    """Moves sum e_a (x_a - x_b) to maxima higher by rise_a and rise_b, and adds a tile to it.

    A term without weight is dropped, also where x_b = -inf makes it infinite.
    """
    moved = cross + d_a * (rise_b - rise_a)
    added = tl.sum(tl.where(e_a > 0, e_a * (x_a - x_b), 0.0), axis=1)
    return tl.where(keep > 0, keep * moved, 0.0) + added


@triton.jit
def _merge_cross(cross, keep, d_a, rise_a, rise_b):
    """The lanes' cross sums, brought to the row's maxima and added."""
    moved = cross + d_a * (rise_b - rise_a)
    return tl.sum(tl.where(keep > 0, keep * moved, 0.0), axis=0)


@triton.jit
def softmax_stats(
    student, teacher,                    # in   [V], as of load_classes
    V,
    scale, inv_temperature,              # scale = log2(e) / temperature
    ROW_SUMS: tl.constexpr, NEEDS_D_1: tl.constexpr, SMOOTHS: tl.constexpr,
    HAS_EXTRAS: tl.constexpr, BLOCK_V: tl.constexpr, VECTOR: tl.constexpr,
    BEND_S: tl.constexpr, BEND_T: tl.constexpr,
):  # fmt: skip
    """Pass 1: (max_s, d_s, max_t, d_t, d_1, mean), mean of d under p or of -d under q, or 0.

    Then what is 0 unless asked for: the mean of z_s - max_s; means of z - max of both under their
    own softmax; 1 where a class is the largest of both.

    Every lane, the owner of VECTOR neighbouring columns, keeps an online softmax of its own: inside
    the loop no warp waits for another, and one rescaling serves VECTOR logits.
    """
    LANES: tl.constexpr = BLOCK_V // VECTOR
    m_s = tl.full([LANES], NO_MAX, tl.float32)
    m_t = tl.full([LANES], NO_MAX, tl.float32)
    d_s = tl.zeros([LANES], tl.float32)
    d_t = tl.zeros([LANES], tl.float32)
    d_1 = tl.zeros([LANES], tl.float32)
    cross = tl.zeros([LANES], tl.float32)
    x_sum = tl.zeros([LANES], tl.float32)
    count = tl.zeros([LANES], tl.float32)
    e_x_s = tl.zeros([LANES], tl.float32)
    e_x_t = tl.zeros([LANES], tl.float32)
    t_at_s = tl.full([LANES], -float("inf"), tl.float32)

    offs_lane = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    num_tiles = tl.cdiv(V, BLOCK_V)
    for i in range(num_tiles):
        tile = i
        if ROW_SUMS != "normalised":
            tile = num_tiles - 1 - i
        offs_v = tile * BLOCK_V + offs_lane
        z_s = load_bent(student, offs_v, V, BEND_S)
        z_t = load_bent(teacher, offs_v, V, BEND_T)
        m_s_new = tl.maximum(m_s, tl.max(z_s, axis=1))
        m_t_new = tl.maximum(m_t, tl.max(z_t, axis=1))
        rise_s = m_s_new - m_s
        rise_t = m_t_new - m_t
        keep_s = tl.exp2(-rise_s * scale)
        keep_t = tl.exp2(-rise_t * scale)
        x_s = z_s - m_s_new[:, None]
        x_t = z_t - m_t_new[:, None]
        e_s = tl.exp2(x_s * scale)
        e_t = tl.exp2(x_t * scale)
        if ROW_SUMS == "mean_under_p":
            cross = _add_cross(cross, keep_t, d_t, rise_t, rise_s, e_t, x_t, x_s)
        if ROW_SUMS == "mean_under_q":
            cross = _add_cross(cross, keep_s, d_s, rise_s, rise_t, e_s, x_s, x_t)
        if NEEDS_D_1:
            d_1 = d_1 * tl.exp2(-rise_s * LOG2E) + tl.sum(tl.exp2(x_s * LOG2E), axis=1)
        if SMOOTHS:
            x_sum += tl.sum(tl.where(offs_v < V, x_s, 0.0), axis=1) - rise_s * count
            count += tl.sum(tl.where(offs_v < V, 1.0, 0.0), axis=1)
        if HAS_EXTRAS:
            moved_s = tl.where(keep_s > 0, keep_s * (e_x_s - d_s * rise_s), 0.0)
            moved_t = tl.where(keep_t > 0, keep_t * (e_x_t - d_t * rise_t), 0.0)
            e_x_s = moved_s + tl.sum(tl.where(e_s > 0, e_s * x_s, 0.0), axis=1)
            e_x_t = moved_t + tl.sum(tl.where(e_t > 0, e_t * x_t, 0.0), axis=1)
            # the teacher's logit at the student's largest; of several, the largest
            of_tile = tl.max(tl.where(x_s == 0, z_t, -float("inf")), axis=1)
            t_at_s = tl.where(rise_s > 0, of_tile, tl.maximum(t_at_s, of_tile))
        d_s = d_s * keep_s + tl.sum(e_s, axis=1)
        d_t = d_t * keep_t + tl.sum(e_t, axis=1)
        m_s = m_s_new
        m_t = m_t_new

    max_s = tl.max(m_s, axis=0)
    max_t = tl.max(m_t, axis=0)
    rise_s = max_s - m_s
    rise_t = max_t - m_t
    keep_s = tl.exp2(-rise_s * scale)
    keep_t = tl.exp2(-rise_t * scale)
    sum_s = tl.sum(d_s * keep_s, axis=0)
    sum_t = tl.sum(d_t * keep_t, axis=0)
    sum_1 = sum_s
    if NEEDS_D_1:
        sum_1 = tl.sum(d_1 * tl.exp2(-rise_s * LOG2E), axis=0)
    # the logarithm of one ratio loses less than the difference of two logarithms near 10
    mean = 0.0
    if ROW_SUMS == "mean_under_p":
        cross_sum = _merge_cross(cross, keep_t, d_t, rise_t, rise_s)
        mean = cross_sum / sum_t * inv_temperature + tl.log(sum_s / sum_t)
    if ROW_SUMS == "mean_under_q":
        cross_sum = _merge_cross(cross, keep_s, d_s, rise_s, rise_t)
        mean = cross_sum / sum_s * inv_temperature + tl.log(sum_t / sum_s)
    mean_x = 0.0
    if SMOOTHS:
        mean_x = tl.sum(x_sum - rise_s * count, axis=0) / V
    mean_x_s = 0.0
    mean_x_t = 0.0
    shares_top = 0.0
    if HAS_EXTRAS:
        moved_s = tl.where(keep_s > 0, keep_s * (e_x_s - d_s * rise_s), 0.0)
        moved_t = tl.where(keep_t > 0, keep_t * (e_x_t - d_t * rise_t), 0.0)
        mean_x_s = tl.sum(moved_s, axis=0) / sum_s
        mean_x_t = tl.sum(moved_t, axis=0) / sum_t
        at_top = tl.max(tl.where(rise_s == 0, t_at_s, -float("inf")), axis=0)
        shares_top = tl.where(at_top == max_t, 1.0, 0.0)
    return max_s, sum_s, max_t, sum_t, sum_1, mean, mean_x, mean_x_s, mean_x_t, shares_top

"""What the Triton row kernels add for divergences that are functions of sums over the row.

S = sum p^alpha q^(1 - alpha) of "renyi", sum min(p, q) of "negative_log_acceptance": a number near
1 for near rows, else known by its logarithm; `rows` of the records in `kernels.divergences`. Such a
row is read three times before its gradient: softmaxes, sums, and the sum of u.
"""

import triton
import triton.language as tl

from modxfer_fast.kernels.kd_loss.triton_divergences import LN2, probabilities
from modxfer_fast.kernels.kd_loss.triton_softmax import LOG2E, NO_MAX, load_bent

INF = tl.constexpr(float("inf"))


@triton.jit
def _expm1_small(x):
    """e^x - 1 for |x| <= 1/2, exactly 0 at 0."""
    y = 1.0 + x * (1.0 / 9.0)
    y = 1.0 + y * x * (1.0 / 8.0)
    y = 1.0 + y * x * (1.0 / 7.0)
    y = 1.0 + y * x * (1.0 / 6.0)
    y = 1.0 + y * x * (1.0 / 5.0)
    y = 1.0 + y * x * (1.0 / 4.0)
    y = 1.0 + y * x * (1.0 / 3.0)
    y = 1.0 + y * x * (1.0 / 2.0)
    return x * y


@triton.jit
def _log1p(x):
    """log(1 + x) for x >= -1/2, also of small x: from the rounding of 1 + x."""
    y = 1.0 + x
    return tl.where(y == 1.0, x, tl.log(y) * (x / tl.where(y == 1.0, 1.0, y - 1.0)))


@triton.jit
def _sign(gap):
    return tl.where(gap > 0, 1.0, tl.where(gap < 0, -1.0, gap))


@triton.jit
def _log2_addend(d, log2_p, log2_q, c0, DIVERGENCE: tl.constexpr):
    """log2 of the class's addend of S."""
    if DIVERGENCE == "renyi":
        of_p = tl.where(c0 > 1.0, INF, -INF)  # of a class that the student alone excludes
        absent = tl.where(log2_p == -INF, -INF, of_p)
        log = tl.where(log2_q == -INF, absent, log2_q + c0 * d)
    else:
        log = tl.minimum(log2_p, log2_q)
    return log


@triton.jit
def _renyi_excess(q, d, log, c0):
    """p^alpha q^(1 - alpha) - q, exactly 0 where d is."""
    power = (LN2 * c0) * d
    return tl.where(tl.abs(power) < 0.5, q * _expm1_small(power), tl.exp2(log) - q)


@triton.jit
def of_row_terms(
    p, q, d, log2_p, log2_q, c0, is_near, factor, log2_s, DIVERGENCE: tl.constexpr
):  # fmt: skip
    """u of each class; is_near, factor and log2_s are those of `of_row_sums`."""
    gap = tl.where(d == 0, 0.0, q - p)
    if DIVERGENCE == "lk_hybrid":
        u = factor * gap + (1.0 - factor) * (0.5 * q) * _sign(gap)
    else:
        log = _log2_addend(d, log2_p, log2_q, c0, DIVERGENCE)
        far = tl.exp2(log - log2_s)
        if DIVERGENCE == "renyi":
            u = -tl.where(is_near, factor * _renyi_excess(q, d, log, c0), far)
        else:
            near = factor * (0.5 * q) * _sign(gap)
            less = tl.where(d > 0, 1.0, tl.where(d == 0, 0.5, 0.0))
            u = tl.where(is_near, near, -far * less)
    return u


@triton.jit
def of_row_sums(
    student_ptr, teacher_ptr,            # in   [V]
    V,
    max_s, logd_s, max_t, logd_t,
    scale, c0, c1,
    DIVERGENCE: tl.constexpr, BLOCK_V: tl.constexpr, BEND_S: tl.constexpr, BEND_T: tl.constexpr,
):  # fmt: skip
    """The divergence, sum u, and what `of_row_terms` takes of the row.

    S is summed relative to the largest addend that a lane has seen.
    """
    top = tl.full([BLOCK_V], NO_MAX, tl.float32)
    total = tl.zeros([BLOCK_V], tl.float32)
    excess = tl.zeros([BLOCK_V], tl.float32)
    second_order = tl.zeros([BLOCK_V], tl.float32)
    distance = tl.zeros([BLOCK_V], tl.float32)
    kl = tl.zeros([BLOCK_V], tl.float32)
    num_tiles = tl.cdiv(V, BLOCK_V)
    for i in range(num_tiles):
        offs_v = (num_tiles - 1 - i) * BLOCK_V + tl.arange(0, BLOCK_V)
        z_s = load_bent(student_ptr, offs_v, V, BEND_S)
        z_t = load_bent(teacher_ptr, offs_v, V, BEND_T)
        p, q, d, log2_p, log2_q = probabilities(z_s, z_t, max_s, logd_s, max_t, logd_t, scale)
        gap = tl.where(d == 0, 0.0, p - q)
        distance += 0.5 * tl.abs(gap)
        if DIVERGENCE == "lk_hybrid":
            kl += tl.where(p == 0, 0.0, LN2 * p * d)
        else:
            log = _log2_addend(d, log2_p, log2_q, c0, DIVERGENCE)
            higher = tl.maximum(top, log)
            total = total * tl.exp2(top - higher) + tl.exp2(log - higher)
            top = higher
            if DIVERGENCE == "renyi":
                more = _renyi_excess(q, d, log, c0)
                excess += more
                second_order += more - c0 * gap
    variation = tl.sum(distance, axis=0)
    most = tl.max(top, axis=0)
    is_near = True
    log2_s = 0.0
    if DIVERGENCE == "lk_hybrid":
        factor = tl.exp2((c0 * (variation - 1.0)) * LOG2E)
        kl_sum = tl.sum(kl, axis=0)
        kd = tl.where(kl_sum > 0, factor * kl_sum, 0.0) + (1.0 - factor) * variation
    else:
        total_sum = tl.sum(total * tl.exp2(top - most), axis=0)
        log2_s = most + tl.log2(total_sum)
        log_s = LN2 * log2_s
        if DIVERGENCE == "renyi":
            is_near = tl.abs(log_s) < 0.5
            excess_sum = tl.sum(excess, axis=0)
            near = _log1p(tl.where(is_near, tl.sum(second_order, axis=0), 0.0))
            kd = c1 * tl.where(is_near, near, log_s)
            kd = tl.where(most == INF, INF, kd)
            factor = 1.0 / tl.where(is_near, 1.0 + excess_sum, 1.0)
        else:
            is_near = variation < 0.5
            near = _log1p(tl.where(is_near, -variation, 0.0))
            kd = -tl.where(is_near, near, log_s)
            factor = 1.0 / tl.where(is_near, 1.0 - variation, 1.0)
        kd = tl.where(total_sum == 0, INF, kd)  # no class has a probability on both sides
        log2_s = tl.where(total_sum == 0, 0.0, log2_s)
    kd += variation - variation  # a NaN is no class that has less than another
    log2_s += variation - variation
    u_sum = tl.zeros([BLOCK_V], tl.float32)
    for i in range(num_tiles):
        offs_v = i * BLOCK_V + tl.arange(0, BLOCK_V)
        z_s = load_bent(student_ptr, offs_v, V, BEND_S)
        z_t = load_bent(teacher_ptr, offs_v, V, BEND_T)
        p, q, d, log2_p, log2_q = probabilities(z_s, z_t, max_s, logd_s, max_t, logd_t, scale)
        u_sum += of_row_terms(p, q, d, log2_p, log2_q, c0, is_near, factor, log2_s, DIVERGENCE)
    return kd, tl.sum(u_sum, axis=0), is_near, factor, log2_s

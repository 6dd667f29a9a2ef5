"""What the Triton row kernels add for divergences that are functions of sums over the row.

S = sum p^alpha q^(1 - alpha) of "renyi", sum min(p, q) of "negative_log_acceptance": a number near
1 for near rows, else known by its logarithm; `OfRow` of the records in `kernels.divergences`. Such
a row is read twice before its gradient: softmaxes and sums.
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
def _less(d):
    """1 where the student has less than the teacher, 1/2 where it has as much."""
    return tl.where(d > 0, 1.0, tl.where(d == 0, 0.5, 0.0))


@triton.jit
def of_row_terms(p, q, d, log2_p, log2_q, c0, slope, log2_s, DIVERGENCE: tl.constexpr):
    """u of each class; slope, 0 where S is far from 1, and log2_s are those of `_value`."""
    gap = tl.where(d == 0, 0.0, q - p)
    if DIVERGENCE == "lk_hybrid":
        u = slope * gap + (1.0 - slope) * (0.5 * q) * _sign(gap)
    else:
        log = _log2_addend(d, log2_p, log2_q, c0, DIVERGENCE)
        far = tl.exp2(log - log2_s)
        if DIVERGENCE == "renyi":
            u = -tl.where(slope != 0, slope * _renyi_excess(q, d, log, c0), far)
        else:
            near = slope * (0.5 * q) * _sign(gap)
            u = tl.where(slope != 0, near, -far * _less(d))
    return u


@triton.jit
def _added(
    top, total, first, second, variation, signed,
    p, q, d, log2_p, log2_q, c0, DIVERGENCE: tl.constexpr,
):  # fmt: skip
    """The sums of each lane with one class more; S and `first` of a logarithm are relative to the
    largest addend that the lane has seen."""
    gap = tl.where(d == 0, 0.0, p - q)
    variation += 0.5 * tl.abs(gap)
    if DIVERGENCE != "renyi":
        signed += 0.5 * q * _sign(-gap)
    if DIVERGENCE == "lk_hybrid":
        first += tl.where(p == 0, 0.0, LN2 * p * d)
    else:
        log = _log2_addend(d, log2_p, log2_q, c0, DIVERGENCE)
        higher = tl.maximum(top, log)
        keep = tl.exp2(top - higher)
        part = tl.exp2(log - higher)
        total = total * keep + part
        top = higher
        if DIVERGENCE == "renyi":
            more = _renyi_excess(q, d, log, c0)
            first += more
            second += more - c0 * gap
        else:
            first = first * keep + part * _less(d)
    return top, total, first, second, variation, signed


@triton.jit
def _summed(top, total, first, second, variation, signed, DIVERGENCE: tl.constexpr):
    """(log2 S, first, second, variation, signed) of all lanes, as `OfRow.sums` but for the base."""
    log2_s = 0.0
    first_sum = 0.0
    variation_sum = tl.sum(variation, axis=0)
    if DIVERGENCE == "lk_hybrid":
        first_sum = tl.sum(first, axis=0)
    else:
        most = tl.max(top, axis=0)
        keep = tl.exp2(top - most)
        log2_s = most + tl.log2(tl.sum(total * keep, axis=0))
        log2_s = tl.where(most == INF, INF, log2_s)
        log2_s += variation_sum - variation_sum  # a NaN is no class that has less than another
        if DIVERGENCE == "renyi":
            first_sum = tl.sum(first, axis=0)
        else:
            first_sum = most + tl.log2(tl.sum(first * keep, axis=0))
    return log2_s, first_sum, tl.sum(second, axis=0), variation_sum, tl.sum(signed, axis=0)


@triton.jit
def _value(log2_s, first, second, variation, signed, c0, c1, DIVERGENCE: tl.constexpr):
    """The divergence, sum u, slope and log2 S of a row with these sums."""
    if DIVERGENCE == "lk_hybrid":
        slope = tl.exp2((c0 * (variation - 1.0)) * LOG2E)
        kd = tl.where(first > 0, slope * first, 0.0) + (1.0 - slope) * variation
        u_sum = (1.0 - slope) * signed
    else:
        log_s = LN2 * log2_s
        of_all = log2_s
        log2_s = tl.where(of_all == -INF, 0.0, of_all)  # of sides that share no class
        if DIVERGENCE == "renyi":
            is_near = tl.abs(log_s) < 0.5
            near = _log1p(tl.where(is_near, second, 0.0))
            kd = c1 * tl.where(is_near, near, log_s)
            slope = tl.where(is_near, 1.0 / tl.where(is_near, 1.0 + first, 1.0), 0.0)
            u_sum = tl.where(is_near, -slope * first, -tl.exp2(of_all - log2_s))
        else:
            is_near = variation < 0.5
            near = _log1p(tl.where(is_near, -variation, 0.0))
            kd = -tl.where(is_near, near, log_s)
            slope = tl.where(is_near, 1.0 / tl.where(is_near, 1.0 - variation, 1.0), 0.0)
            u_sum = tl.where(is_near, slope * signed, -tl.exp2(first - log2_s))
    kd += variation - variation
    return kd, u_sum, slope, log2_s


@triton.jit
def of_row_parts(
    student, teacher,                    # in   [V], as of load_classes
    V,
    max_s, logd_s, max_t, logd_t,
    scale, c0,
    DIVERGENCE: tl.constexpr, BLOCK_V: tl.constexpr, BEND_S: tl.constexpr, BEND_T: tl.constexpr,
):  # fmt: skip
    """(log2 S, first, second, variation, signed) of these classes."""
    top = tl.full([BLOCK_V], NO_MAX, tl.float32)
    total = tl.zeros([BLOCK_V], tl.float32)
    first = tl.zeros([BLOCK_V], tl.float32)
    second = tl.zeros([BLOCK_V], tl.float32)
    variation = tl.zeros([BLOCK_V], tl.float32)
    signed = tl.zeros([BLOCK_V], tl.float32)
    num_tiles = tl.cdiv(V, BLOCK_V)
    for i in range(num_tiles):
        offs_v = (num_tiles - 1 - i) * BLOCK_V + tl.arange(0, BLOCK_V)
        z_s = load_bent(student, offs_v, V, BEND_S)
        z_t = load_bent(teacher, offs_v, V, BEND_T)
        p, q, d, log2_p, log2_q = probabilities(z_s, z_t, max_s, logd_s, max_t, logd_t, scale)
        top, total, first, second, variation, signed = _added(
            top, total, first, second, variation, signed, p, q, d, log2_p, log2_q, c0, DIVERGENCE
        )  # fmt: skip
    return _summed(top, total, first, second, variation, signed, DIVERGENCE)


@triton.jit
def of_row_sums(
    student, teacher,                    # in   [V], as of load_classes
    V,
    max_s, logd_s, max_t, logd_t,
    scale, c0, c1,
    DIVERGENCE: tl.constexpr, BLOCK_V: tl.constexpr, BEND_S: tl.constexpr, BEND_T: tl.constexpr,
):  # fmt: skip
    """The divergence, sum u, and what `of_row_terms` takes of the row."""
    log2_s, first, second, variation, signed = of_row_parts(
        student, teacher, V, max_s, logd_s, max_t, logd_t, scale, c0,
        DIVERGENCE, BLOCK_V, BEND_S, BEND_T,
    )  # fmt: skip
    return _value(log2_s, first, second, variation, signed, c0, c1, DIVERGENCE)


@triton.jit
def of_list(p, q, d, log2_p, log2_q, c0, c1, DIVERGENCE: tl.constexpr):
    """The divergence and u of a row that is all there."""
    zeros = tl.zeros_like(p)
    top, total, first, second, variation, signed = _added(
        zeros + NO_MAX, zeros, zeros, zeros, zeros, zeros, p, q, d, log2_p, log2_q, c0, DIVERGENCE
    )  # fmt: skip
    log2_s, first, second, variation, signed = _summed(
        top, total, first, second, variation, signed, DIVERGENCE
    )  # fmt: skip
    kd, _, slope, log2_s = _value(log2_s, first, second, variation, signed, c0, c1, DIVERGENCE)
    return kd, of_row_terms(p, q, d, log2_p, log2_q, c0, slope, log2_s, DIVERGENCE)

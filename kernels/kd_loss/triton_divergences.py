"""Terms of the divergences in the Triton row kernels; formulas in `kernels.divergences`.

Logarithms are those of base 2, as `tl.exp2` takes them.
"""

import math

import triton
import triton.language as tl

LN2 = tl.constexpr(math.log(2.0))
LOG2E = tl.constexpr(math.log2(math.e))


@triton.jit
def _log2_mean_with_1(x):
    """log2((1 + x) / 2) for x in [0, 1], error below 1.1e-7 and exactly 0 at 1.

    Least maximum error polynomial of degree 8 for log2((1 + x) / 2) / (x - 1): ten operations,
    where `tl.log2` takes about thirty and makes the pass compute-bound.
    """
    y = 0.00545409974
    y = y * x - 0.0279898327
    y = y * x + 0.0684036762
    y = y * x - 0.112808555
    y = y * x + 0.1539592
    y = y * x - 0.201578796
    y = y * x + 0.278602153
    y = y * x - 0.442693591
    y = y * x + 1.0
    return (x - 1.0) * y


@triton.jit
def _log2_of_mixture(d, c2, c3):
    """log2(m / q) and log2(m / p) of a mixture m of p and q, c2 and c3 = log2(2 weight) of either.

    logaddexp(log weight_p + d, log weight_q) and its mirror image, each from the larger argument;
    d = 0 at equal weights gives 0.
    """
    s = d + (c2 - c3)
    mean = _log2_mean_with_1(tl.exp2(-tl.abs(s)))
    return tl.maximum(s, 0.0) + (mean + c3), tl.maximum(-s, 0.0) + (mean + c2)


@triton.jit
def _exp2_minus_1(x):
    """2^x - 1 for x <= 0, exactly 0 at 0; below -1/2 the difference has no digit to lose."""
    y = LN2 * x
    series = 1.0 + y * (1.0 / 8.0)
    series = 1.0 + y * series * (1.0 / 7.0)
    series = 1.0 + y * series * (1.0 / 6.0)
    series = 1.0 + y * series * (1.0 / 5.0)
    series = 1.0 + y * series * (1.0 / 4.0)
    series = 1.0 + y * series * (1.0 / 3.0)
    series = 1.0 + y * series * (1.0 / 2.0)
    return tl.where(x > -0.5, y * series, tl.exp2(x) - 1.0)


@triton.jit
def probabilities(z_s, z_t, max_s, logd_s, max_t, logd_t, scale):
    """p, q, d = log2(p / q) from differences of logits before a logarithm rounds them, and log2
    of p and q."""
    x_s = z_s - max_s
    x_t = z_t - max_t
    log2_p = x_t * scale - logd_t * LOG2E
    log2_q = x_s * scale - logd_s * LOG2E
    d = (x_t - x_s) * scale - (logd_t - logd_s) * LOG2E
    return tl.exp2(log2_p), tl.exp2(log2_q), d, log2_p, log2_q


@triton.jit
def divergence_terms(p, q, d, log2_p, log2_q, c0, c1, c2, c3, DIVERGENCE: tl.constexpr):
    """f, u of each class, the terms of `kernels.divergences` with d = log2(p / q).

    c0 to c3 are the constants of its record; of a mixture the weights of p and q, and of both
    log2(2 weight).
    """
    if DIVERGENCE == "forward_kl":
        f = tl.where(p == 0, 0.0, LN2 * p * d)
        u = -p
    if DIVERGENCE == "reverse_kl":
        f = tl.where(q == 0, 0.0, -LN2 * q * d)
        u = f
    if DIVERGENCE == "jsd":
        m_over_q, m_over_p = _log2_of_mixture(d, c2, c3)
        u = tl.where(q == 0, 0.0, (-LN2 * c1) * q * m_over_q)
        f = tl.where(p == 0, 0.0, (-LN2 * c0) * p * m_over_p) + u
    if DIVERGENCE == "total_variation":
        gap = q - p
        f = 0.5 * tl.abs(gap)
        u = (0.5 * q) * tl.where(gap > 0, 1.0, tl.where(gap < 0, -1.0, gap))
    if DIVERGENCE == "skew_forward_kl":
        m_over_q, m_over_p = _log2_of_mixture(d, c2, c3)
        is_nothing = ((p == 0) & (q == 0)) | (d == 0)
        f = tl.where((p == 0) | is_nothing, 0.0, -LN2 * p * m_over_p)
        u = tl.where(is_nothing, 0.0, (c1 * c1) * (q - p) * tl.exp2(-m_over_q))
    if DIVERGENCE == "skew_reverse_kl":
        s = d + (c2 - c3)
        m_over_q = tl.maximum(s, 0.0) + (_log2_mean_with_1(tl.exp2(-tl.abs(s))) + c3)
        is_nothing = (q == 0) | (d == 0)
        f = tl.where(is_nothing, 0.0, -LN2 * q * m_over_q)
        u = tl.where(is_nothing, 0.0, f + c1 * q * (1.0 - tl.exp2(-m_over_q)))
    if DIVERGENCE == "jeffreys":
        f = tl.where((p == 0) & (q == 0), 0.0, LN2 * (p - q) * d)
        u = (q - p) + tl.where(q == 0, 0.0, -LN2 * q * d)
    if DIVERGENCE == "squared_hellinger":
        root_p = tl.exp2(0.5 * log2_p)
        root_q = tl.exp2(0.5 * log2_q)
        gap = root_p - root_q
        f = 0.5 * gap * gap
        u = -0.5 * gap * root_q
    if DIVERGENCE == "chi_squared":
        gap = p - q
        # p^2 / q may be finite where p and q are too small to be numbers
        squared = tl.where(log2_p == -float("inf"), 0.0, tl.exp2(log2_p + d))
        near = (tl.abs(d) < 1.0) & (q > 0)
        ratio = gap / tl.where(near, q, 1.0)
        f = tl.where(near, gap * ratio, (squared - p) - gap)
        u = tl.where(near, -ratio * (p + q), q - squared)
    if DIVERGENCE == "alpha_beta":
        # c0 alpha, c1 beta, c2 their sum; from the larger of p and q, whose power is the largest
        top = tl.exp2(c2 * tl.maximum(log2_p, log2_q))
        distance = tl.abs(d)
        of_p = d > 0
        less = _exp2_minus_1(-tl.where(of_p, c1, c0) * distance)
        least = _exp2_minus_1(-c2 * distance)
        gap_p = tl.where(of_p, -less, least - less)
        gap_q = tl.where(of_p, least - less, -less)
        f = tl.where(top == 0, 0.0, (c3 * top) * (c0 * gap_p + c1 * gap_q))
        u = tl.where(top == 0, 0.0, (c1 * c2 * c3 * top) * gap_q)
    return f, u


@triton.jit
def class_terms(
    p, q, d, log2_p, log2_q, c0, c1, c2, c3, DIVERGENCE: tl.constexpr, PARTS: tl.constexpr
):  # fmt: skip
    """f, u of each class, of one divergence, or of a weighted sum, whose numbers are in c0."""
    if PARTS > 1:
        f, u = _sum_terms(p, q, d, log2_p, log2_q, c0, DIVERGENCE, PARTS)
    else:
        f, u = divergence_terms(p, q, d, log2_p, log2_q, c0, c1, c2, c3, DIVERGENCE)
    return f, u


@triton.jit
def _sum_terms(p, q, d, log2_p, log2_q, numbers, DIVERGENCES: tl.constexpr, PARTS: tl.constexpr):
    """Of a weighted sum; numbers: weight and c0 to c3 of each."""
    f = tl.zeros_like(p)
    u = tl.zeros_like(p)
    for k in tl.static_range(PARTS):
        f_k, u_k = divergence_terms(
            p, q, d, log2_p, log2_q,
            numbers[5 * k + 1], numbers[5 * k + 2], numbers[5 * k + 3], numbers[5 * k + 4],
            DIVERGENCES[k],
        )  # fmt: skip
        if DIVERGENCES[k] == "forward_kl":
            u_k += q  # which vanishes with d; sum u is not known beforehand here
        f += numbers[5 * k] * f_k
        u += numbers[5 * k] * u_k
    return f, u

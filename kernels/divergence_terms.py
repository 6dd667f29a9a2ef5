"""Definitions and terms of the divergences, in plain PyTorch; their records are in divergences.py.

p teacher   q student   d = log p - log q

A function without a suffix is a definition, `_terms` gives f and u of each class. Of a function of
sums over the row, or of the logits, `_sums` gives those, `_joined` those of a row from its parts',
`_value` what follows from them and `_u` that of each class, as `OfRow` of divergences.py says.
Those of logits take them in the place of log p and log q. Importing them needs no torch.
"""

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def log_of(weight: float, rest: float) -> float:
    return math.log(weight) if weight < 0.5 else math.log1p(-rest)


def kl(log_a: "Tensor", log_b: "Tensor") -> "Tensor":
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def weighted(weight: "Tensor", log: "Tensor") -> "Tensor":
    # masked before the product: behind it autograd would multiply 0 by an infinite log
    return weight * log.masked_fill(weight == 0, 0.0)


def log_gap(log_p: "Tensor", log_q: "Tensor") -> "Tensor":
    """d, and 0 for a class that both exclude."""
    return (log_p - log_q).masked_fill((log_p == -math.inf) & (log_q == -math.inf), 0.0)


def log_mixture(x: "Tensor", weight: float, rest: float) -> "Tensor":
    """log(weight e^x + rest) of weights whose sum is 1; it vanishes with x, without rounding."""
    near = x.abs() < 1.0
    small = x.masked_fill(~near, 0.0).expm1().mul(weight).log1p()
    log_weight, log_rest = log_of(weight, rest), log_of(rest, weight)
    large = (x + log_weight).logaddexp(x.new_full((), log_rest))
    return small.where(near, large)


def log_mean(log_p: "Tensor", log_q: "Tensor", weight: float) -> "Tensor":
    return (log_p + math.log(weight)).logaddexp(log_q + math.log1p(-weight))


# --- KLs, and what is made of them


def forward_kl_terms(log_p, log_q, alpha, beta):
    p = log_p.exp()
    return weighted(p, log_p - log_q), -p


def reverse_kl_terms(log_p, log_q, alpha, beta):
    u = -weighted(log_q.exp(), log_p - log_q)
    return u, u


def jsd(log_p, log_q, alpha, beta):
    log_m = log_mean(log_p, log_q, beta)
    return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)


def jsd_terms(log_p, log_q, alpha, beta):
    # each from its own side: log(p/m) as d - log(m/q) would be the difference of two large numbers
    # where the student gives a class next to nothing
    d = log_p - log_q
    log_beta, log_rest = math.log(beta), math.log1p(-beta)
    log_m_over_p = (log_rest - d).logaddexp(d.new_full((), log_beta))
    log_m_over_q = (log_beta + d).logaddexp(d.new_full((), log_rest))
    u = (beta - 1) * weighted(log_q.exp(), log_m_over_q)
    return u - beta * weighted(log_p.exp(), log_m_over_p), u


def share(part: "Tensor", whole: "Tensor") -> "Tensor":
    """part / whole, 0 where there is nothing."""
    return part / whole.masked_fill(whole == 0, 1.0)


def skew_forward_kl_terms(log_p, log_q, alpha, beta):
    p, q, d = log_p.exp(), log_q.exp(), log_gap(log_p, log_q)
    rest = 1.0 - alpha
    f = -weighted(p, log_mixture(-d, rest, alpha))
    return f, rest * rest * q * share(q - p, alpha * p + rest * q)


def skew_reverse_kl_terms(log_p, log_q, alpha, beta):
    p, q, d = log_p.exp(), log_q.exp(), log_gap(log_p, log_q)
    rest = 1.0 - alpha
    f = -weighted(q, log_mixture(d, rest, alpha))
    return f, f + alpha * rest * q * share(p - q, rest * p + alpha * q)


def jeffreys_terms(log_p, log_q, alpha, beta):
    p, q, d = log_p.exp(), log_q.exp(), log_p - log_q
    of_q = -weighted(q, d)
    return weighted(p, d) + of_q, (q - p) + of_q


# --- others


def sign(x: "Tensor") -> "Tensor":
    """As `Tensor.sign`, and NaN of NaN."""
    return x.sign() + (x - x)


def total_variation_terms(log_p, log_q, alpha, beta):
    q = log_q.exp()
    gap = q - log_p.exp()
    return 0.5 * gap.abs(), 0.5 * q * sign(gap.detach())


def squared_hellinger(log_p, log_q, alpha, beta):
    return 0.5 * ((0.5 * log_p).exp() - (0.5 * log_q).exp()).square().sum(-1)


def squared_hellinger_terms(log_p, log_q, alpha, beta):
    root_p, root_q = (0.5 * log_p).exp(), (0.5 * log_q).exp()
    gap = root_p - root_q
    return 0.5 * gap * gap, -0.5 * gap * root_q


def chi_squared(log_p, log_q, alpha, beta):
    p, q = log_p.exp(), log_q.exp()
    return ((p - q).square() / q).sum(-1)


def chi_squared_terms(log_p, log_q, alpha, beta):
    p, q, d = log_p.exp(), log_q.exp(), log_gap(log_p, log_q)
    # p^2 / q may be finite where p and q are too small to be numbers
    near, gap, squared = d.abs() < 1.0, p - q, (log_p + d).exp()
    small = d.masked_fill(~near, 0.0).expm1()
    f = (gap * small).where(near, (squared - p) - gap)
    return f, (-gap * (2.0 + small)).where(near, q - squared)


def alpha_beta(log_p, log_q, alpha, beta):
    both = alpha + beta
    p, q = (both * log_p).exp(), (both * log_q).exp()
    mixed = (alpha * log_p + beta * log_q).exp()
    return (alpha / both * p + beta / both * q - mixed).sum(-1) / (alpha * beta)


def alpha_beta_terms(log_p, log_q, alpha, beta):
    # from the larger of p and q, whose power is the largest of the three
    both, d = alpha + beta, log_gap(log_p, log_q)
    top = (both * log_p.maximum(log_q)).exp()
    of_p, distance = d > 0, d.abs()
    less = (-beta * distance).expm1().where(of_p, (-alpha * distance).expm1())
    least = (-both * distance).expm1()
    # with d > 0: p^both = top, q^both = top (1 + least), p^alpha q^beta = top (1 + less)
    gap_p = (-less).where(of_p, least - less)
    gap_q = (least - less).where(of_p, -less)
    f = top * (alpha * gap_p + beta * gap_q) / (alpha * beta * both)
    return f, top * gap_q / alpha


# --- functions of the row


def renyi(log_p, log_q, alpha, beta):
    return (alpha * log_p + (1 - alpha) * log_q).logsumexp(-1) / (alpha - 1)


def _less(log_p, log_q):
    """1 where the student has less than the teacher, 1/2 where it has as much."""
    return (log_q < log_p).to(log_q.dtype) + 0.5 * (log_q == log_p).to(log_q.dtype)


def _signed(log_p, log_q):
    """The u of the total variation, and that."""
    gap = log_q.exp() - log_p.exp()
    return 0.5 * log_q.exp() * sign(gap.detach()), 0.5 * gap.abs().sum(-1)


def _power(log_p, log_q, alpha):
    """log(p^alpha q^(1 - alpha)) and d."""
    d = log_gap(log_p, log_q)
    absent = log_q == -math.inf
    power = log_q.masked_fill(absent, 0.0) + alpha * d.masked_fill(absent, 0.0)
    only_p = math.inf if alpha > 1 else -math.inf
    return power.masked_fill(absent, -math.inf).masked_fill(absent & (log_p > -math.inf), only_p), d


def _excess(log_q, power, d, alpha):
    """p^alpha q^(1 - alpha) - q, exactly 0 where d is; of a row whose S is near 1."""
    q, small = log_q.exp(), (alpha * d).abs() < 0.5
    series = q * (alpha * d).masked_fill(~small, 0.0).expm1()
    return series.where(small, power.masked_fill(power > 0.5, 0.0).exp() - q)


def added_up(parts, num_logs=0):
    """[M, n] of [G, M, n], the first of which are logarithms of sums."""
    joined = parts.sum(0)
    joined[:, :num_logs] = parts[..., :num_logs].logsumexp(0)
    return joined


def renyi_sums(log_p, log_q, alpha):
    # S = sum p^alpha q^(1 - alpha) is a number near 1 for near rows, and else known by its
    # logarithm
    power, d = _power(log_p, log_q, alpha)
    excess = _excess(log_q, power, d, alpha)
    second_order = (excess - alpha * (log_p.exp() - log_q.exp())).sum(-1)
    _, variation = _signed(log_p, log_q)
    return power.logsumexp(-1), excess.sum(-1), second_order, variation, variation * 0.0


def renyi_value(sums, alpha):
    log_s, excess, second_order, *_ = sums
    is_near = log_s.abs() < 0.5
    near = second_order.masked_fill(~is_near, 0.0).log1p()
    slope = (1.0 / (1.0 + excess.masked_fill(~is_near, 0.0))).masked_fill(~is_near, 0.0)
    safe = log_s.masked_fill(log_s == -math.inf, 0.0)  # of sides that share no class
    u_sum = (-slope * excess).where(is_near, -(log_s - safe).exp())
    return near.where(is_near, log_s) / (alpha - 1), u_sum, slope, safe


def renyi_u(log_p, log_q, alpha, slope, log_s):
    power, d = _power(log_p, log_q, alpha)
    near = -slope * _excess(log_q, power, d, alpha)
    return near.where(slope > 0, -(power - log_s).exp())


def negative_log_acceptance(log_p, log_q, alpha, beta):
    return -log_p.minimum(log_q).logsumexp(-1)


def negative_log_acceptance_sums(log_p, log_q, alpha):
    # A = sum min(p, q) = 1 - TV, or by its logarithm where little is left
    least = log_p.minimum(log_q)
    signed, variation = _signed(log_p, log_q)
    less = (least + _less(log_p, log_q).log()).detach().logsumexp(-1)
    return least.logsumexp(-1), less, variation * 0.0, variation, signed.detach().sum(-1)


def negative_log_acceptance_value(sums, alpha):
    log_a, less, _, variation, signed = sums
    is_near = variation < 0.5
    near = (-variation).masked_fill(~is_near, 0.0).log1p()
    slope = (1.0 / (1.0 - variation.masked_fill(~is_near, 0.0))).masked_fill(~is_near, 0.0)
    safe = log_a.masked_fill(log_a == -math.inf, 0.0)
    u_sum = (slope * signed).where(is_near, -(less - safe).exp())
    return -near.where(is_near, log_a), u_sum, slope, safe


def negative_log_acceptance_u(log_p, log_q, alpha, slope, log_a):
    signed, _ = _signed(log_p, log_q)
    far = -(log_p.minimum(log_q) - log_a).exp() * _less(log_p, log_q)
    return (slope * signed).where(slope > 0, far)


def blend(log_p, log_q, alpha):
    """exp(-alpha sum min(p, q)), a constant of the gradient, and the total variation."""
    variation = 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)
    return (-alpha * (1.0 - variation.detach())).exp(), variation


def lk_hybrid(log_p, log_q, alpha, beta):
    weight, variation = blend(log_p, log_q, alpha)
    return weight * kl(log_p, log_q) + (1.0 - weight) * variation


def lk_hybrid_sums(log_p, log_q, alpha):
    signed, variation = _signed(log_p, log_q)
    kl = weighted(log_p.exp(), log_p - log_q).sum(-1)
    zeros = variation * 0.0
    return zeros, kl, zeros, variation, signed.detach().sum(-1)


def lk_hybrid_value(sums, alpha):
    _, kl, zeros, variation, signed = sums
    weight = (-alpha * (1.0 - variation.detach())).exp()
    return weight * kl + (1.0 - weight) * variation, (1.0 - weight) * signed, weight, zeros


def lk_hybrid_u(log_p, log_q, alpha, weight, _):
    signed, _ = _signed(log_p, log_q)
    return weight * (log_q.exp() - log_p.exp()) + (1.0 - weight) * signed


# --- of the logits, y of the teacher and x of the student


def logits_mse(y, x, alpha, beta):
    return (x - y).square().mean(-1)


def logits_mse_sums(y, x, alpha):
    y, x, apart = present(y, x)
    squares = ((x - y) + apart).square().sum(-1)
    return squares, squares.new_full(squares.shape, x.shape[-1])


def logits_mse_value(sums, alpha):
    squares, classes = sums
    return squares / classes, squares.new_zeros(squares.shape), 2.0 / classes


def logits_mse_u(y, x, alpha, slope):
    y, x, apart = present(y, x)
    return slope * ((x - y) + apart)


def logits_cosine(y, x, alpha, beta):
    of_x, of_y = (z / z.norm(dim=-1, keepdim=True).clamp(min=1e-30) for z in (x, y))
    return 1.0 - (of_x * of_y).sum(-1)


def logits_cosine_sums(y, x, alpha):
    """|x|, |y| and the divergence, of these classes alone.

    Half the squared distance of the rows of length 1, which does not cancel where they are near; a
    row of zeros has a right angle to every other.
    """
    y, x, apart = present(y, x)
    length_x, length_y = length(x), length(y)
    gap = (unit_row(x, length_x) - unit_row(y, length_y)) + apart
    divergence = _half(length_x, length_y) * gap.square().sum(-1, keepdim=True)
    return tuple(number[..., 0] for number in (length_x, length_y, divergence))


def logits_cosine_joined(parts):
    """By the shares a_r = |x_r| / |x| and b_r = |y_r| / |y| of parts whose own divergence is D_r:

    D = sum_r (a_r - b_r)^2 / 2 + a_r b_r D_r
    """
    of_parts_x, of_parts_y, own = parts.unbind(-1)
    length_x, length_y = (of.square().sum(0).sqrt() for of in (of_parts_x, of_parts_y))
    a, b = unit_row(of_parts_x, length_x), unit_row(of_parts_y, length_y)
    inside = (a * b * own).masked_fill(own == math.inf, math.inf)  # a share of it may be 0
    joined = parts.new_empty(parts.shape[1:])
    joined[:, 0], joined[:, 1] = length_x, length_y
    joined[:, 2] = (_half(length_x, length_y) * (a - b).square() + inside).sum(0)
    return joined


def logits_cosine_value(sums, alpha):
    length_x, length_y, divergence = sums
    zeros = divergence.new_zeros(divergence.shape)
    return divergence, zeros, length_x, length_y, divergence


def logits_cosine_u(y, x, alpha, length_x, length_y, divergence):
    y, x, apart = present(y, x)
    of_x = unit_row(x, length_x)
    gap = (of_x - unit_row(y, length_y)) + apart
    slope = (1.0 / length_x).clamp(max=3e38).masked_fill(length_x == 0, 0.0)
    return slope * (gap - divergence * of_x)


def present(y: "Tensor", x: "Tensor") -> "tuple[Tensor, Tensor, Tensor]":
    """Both with 0 for a class that they exclude, NaN for what is no logit; and what to add to a
    difference: infinity where one side alone excludes.
    """
    no_y, no_x = y == -math.inf, x == -math.inf
    apart = x.new_zeros(()).masked_fill(no_y != no_x, math.inf)
    return _logits(y, no_y), _logits(x, no_x), apart


def _logits(z: "Tensor", absent: "Tensor") -> "Tensor":
    return z.masked_fill(absent, 0.0).masked_fill(z == math.inf, math.nan)


def length(x: "Tensor") -> "Tensor":
    """|x| of rows, [..., 1]; squares of no size overflow."""
    top = x.detach().abs().amax(-1, keepdim=True).clamp(1e-30, 1e30)
    squared = (x / top).square().sum(-1, keepdim=True)
    is_zero = squared == 0  # where autograd has no root
    return top * squared.masked_fill(is_zero, 1.0).sqrt().masked_fill(is_zero, 0.0)


def unit_row(x: "Tensor", length: "Tensor") -> "Tensor":
    """x / |x|, 0 of a row of zeros."""
    return x / length.masked_fill(length == 0, 1.0)


def _half(length_x: "Tensor", length_y: "Tensor") -> "Tensor":
    """1/2, and 1 of the right angle between a row of zeros and another."""
    half = length_x.new_full((), 0.5)
    return half.where((length_x == 0) == (length_y == 0), length_x.new_full((), 1.0))

"""Generalised JSD of log-probabilities as they are given, normalised or not, class by class.

p teacher   q student   m = beta p + (1 - beta) q
"""

import math

from torch import Tensor


def jsd_addends(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """What each class adds to the divergence, [..., V]; differentiable.

    KL(p || q) at beta 0 and KL(q || p) at 1, which are not the limits of the formula between.
    """
    p, q = log_p.exp(), log_q.exp()
    if beta == 0.0:
        return _weighted(p, log_p - log_q)
    if beta == 1.0:
        return _weighted(q, log_q - log_p)
    log_m = _log_mixture(log_p, log_q, beta)
    return beta * _weighted(p, log_p - log_m) + (1.0 - beta) * _weighted(q, log_q - log_m)


def jsd_gradient(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """The derivative of each addend in its own log_q, [..., V]."""
    q = log_q.exp()
    if beta == 0.0:
        return -log_p.exp()
    if beta == 1.0:
        return _weighted(q, log_q - log_p) + q
    return (1.0 - beta) * _weighted(q, log_q - _log_mixture(log_p, log_q, beta))


def _log_mixture(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    return (log_p + math.log(beta)).logaddexp(log_q + math.log1p(-beta))


def _weighted(weight: Tensor, log: Tensor) -> Tensor:
    # masked before the product, whose autograd would multiply 0 by an infinity
    return weight * log.masked_fill(weight == 0, 0.0)

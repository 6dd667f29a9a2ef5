"""The divergences of the KD losses, one record each. Importing them needs no torch.

p teacher   q student   d = log p - log q   M rows   V classes

A divergence D is a sum over the classes of addends f with a companion u = q dD/dq. Where a constant
is added to dD/dq the gradient in the student's logits z stays the same:

    dD/dz = (u - q sum(u)) / temperature

Names, help, reference, dense yardsticks and tests follow from the records. The kernels have one
branch each: `_divergence_terms` of kd_loss/triton_impl.py and `divergence_terms` of
csrc/cpu/kd_loss_rows.h, whose enum in csrc/include/modxfer/kd_loss.h has the order of this file.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Divergence:
    """What is known of a divergence apart from the kernels.

    Attributes:
        name: as options, job files and the command line give it.
        formula: one line for people, with p, q and, where it is read, beta.
        definition: (log_p, log_q, beta) -> D, [..., V] and [..., V] -> [...], as a user of plain
            PyTorch writes it, for autograd. Every class has a probability, be it small.
        terms: (p, q, d, beta) -> (f, u), each [M, V]. A class without p (or q) adds no p-term (or
            q-term), whatever d is, and has no gradient by autograd; a NaN in p or q stays.
        row_sums: what a kernel needs before it knows D and sum(u). "mean_under_p": D is the mean of
            d under p and sum(u) is -1; "mean_under_q": D is the mean of -d under q, and sum(u) is
            D. Both means are known with the maxima and denominators of the softmaxes, after one
            pass over the logits. "normalised": D = sum(f) and sum(u) take p and q themselves, and a
            second pass.
        ends: names of the divergences that it becomes at beta 0 and 1, where its formula has a
            logarithm of 0. None: it reads no beta.
    """

    name: str
    formula: str
    definition: "Callable[[Tensor, Tensor, float], Tensor]"
    terms: "Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]"
    row_sums: Literal["mean_under_p", "mean_under_q", "normalised"] = "normalised"
    ends: tuple[str, str] | None = None

    @property
    def reads_beta(self) -> bool:
        """Whether beta, the weight of p in a mixture of p and q, has a meaning."""
        return self.ends is not None


def _kl(log_a: "Tensor", log_b: "Tensor") -> "Tensor":
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def _weighted(weight: "Tensor", log: "Tensor") -> "Tensor":
    # masked before the product: behind it autograd would multiply 0 by an infinite log
    return weight * log.masked_fill(weight == 0, 0.0)


def _forward_kl_terms(p, q, d, beta):
    return _weighted(p, d), -p


def _reverse_kl_terms(p, q, d, beta):
    u = -_weighted(q, d)
    return u, u


def _jsd(log_p, log_q, beta):
    log_m = (log_p + math.log(beta)).logaddexp(log_q + math.log1p(-beta))
    return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)


def _jsd_terms(p, q, d, beta):
    # each from its own side: log(p/m) as d - log(m/q) would be the difference of two large numbers
    # where the student gives a class next to nothing
    log_beta, log_rest = math.log(beta), math.log1p(-beta)
    log_m_over_p = (log_rest - d).logaddexp(d.new_full((), log_beta))
    log_m_over_q = (log_beta + d).logaddexp(d.new_full((), log_rest))
    u = (beta - 1) * _weighted(q, log_m_over_q)
    return u - beta * _weighted(p, log_m_over_p), u


_RECORDS = (
    Divergence(
        name="forward_kl",
        formula="KL(p || q)",
        definition=lambda log_p, log_q, beta: _kl(log_p, log_q),
        terms=_forward_kl_terms,
        row_sums="mean_under_p",
    ),
    Divergence(
        name="reverse_kl",
        formula="KL(q || p)",
        definition=lambda log_p, log_q, beta: _kl(log_q, log_p),
        terms=_reverse_kl_terms,
        row_sums="mean_under_q",
    ),
    # generalised JSD of GKD, Agarwal et al. 2024, arXiv 2306.13649
    Divergence(
        name="jsd",
        formula="beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q",
        definition=_jsd,
        terms=_jsd_terms,
        ends=("forward_kl", "reverse_kl"),
    ),
)

DIVERGENCES: Mapping[str, Divergence] = MappingProxyType({r.name: r for r in _RECORDS})
# What help texts say: every name with its formula.
FORMULAS = "; ".join(f"{r.name} = {r.formula}" for r in _RECORDS)
# The names that beta may stand beside, for messages: "jsd".
WITH_BETA = " or ".join(r.name for r in _RECORDS if r.reads_beta)

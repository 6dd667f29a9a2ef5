"""The divergences of the KD losses, one record each. Importing them needs no torch.

p teacher   q student   d = log p - log q   M rows   V classes

A divergence D is a sum over the classes of addends f with a companion u = q dD/dq. Where a constant
is added to dD/dq the gradient in the student's logits z stays the same:

    dD/dz = (u - q sum(u)) / temperature

so u is written such that it vanishes with d, where that is possible: equal rows then have no
gradient, to the last bit.

Names, help, reference, dense yardsticks and tests follow from the records. The kernels have one
branch each: `divergence_terms` of kd_loss/triton_divergences.py and `divergence_terms` of
csrc/cpu/kd_loss_rows.h, whose enum in csrc/include/modxfer/kd_loss.h has the order of this file.
"""

import dataclasses
import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class Parameter(NamedTuple):
    """A number that a divergence reads.

    Attributes:
        default: what it is when nobody says.
        low, high: it lies between them; at an end only where `limits` of the record has it.
        text: the range, for messages and help.
    """

    default: float
    low: float
    high: float
    text: str


class Limit(NamedTuple):
    """Where a divergence becomes another: at these parameters, None for any value."""

    alpha: float | None
    beta: float | None
    name: str

    def __str__(self) -> str:
        given = (("alpha", self.alpha), ("beta", self.beta))
        where = " ".join(f"{name}={value:g}" for name, value in given if value is not None)
        return f"{where}, {self.name}"


@dataclasses.dataclass(frozen=True)
class Divergence:
    """What is known of a divergence apart from the kernels.

    Attributes:
        name: as options, job files and the command line give it.
        formula: one line for people, with p, q and, where they are read, alpha and beta.
        definition: (log_p, log_q, alpha, beta) -> D, [..., V] and [..., V] -> [...], as a user of
            plain PyTorch writes it, for autograd. Every class has a probability, be it small.
        terms: (log_p, log_q, alpha, beta) -> (f, u), each [M, V]. A class without p (or q) adds no
            p-term (or q-term), and has no gradient by autograd; a NaN stays.
        row_sums: what a kernel needs before it knows D and sum(u). "mean_under_p": D is the mean of
            d under p and sum(u) is -1; "mean_under_q": D is the mean of -d under q, and sum(u) is
            D. Both means are known with the maxima and denominators of the softmaxes, after one
            pass over the logits. "normalised": D = sum(f) and sum(u) take p and q themselves, and a
            second pass.
        alpha, beta: what it reads, or None.
        limits: at ends of those, where its formula has a logarithm or a quotient of 0, what it is.
        mixes: (alpha, beta) -> weight of p and of q in a mixture of both, each rounded once, where
            it has one.
        constants: (alpha, beta) -> up to four numbers that kernels of a divergence without a
            mixture read.
    """

    name: str
    formula: str
    definition: "Callable[[Tensor, Tensor, float, float], Tensor]"
    terms: "Callable[[Tensor, Tensor, float, float], tuple[Tensor, Tensor]]"
    row_sums: Literal["mean_under_p", "mean_under_q", "normalised"] = "normalised"
    alpha: Parameter | None = None
    beta: Parameter | None = None
    limits: tuple[Limit, ...] = ()
    mixes: Callable[[float, float], tuple[float, float]] | None = None
    constants: Callable[[float, float], tuple[float, ...]] | None = None

    @property
    def reads_alpha(self) -> bool:
        return self.alpha is not None

    @property
    def reads_beta(self) -> bool:
        return self.beta is not None

    def parameters(self, alpha: float | None, beta: float | None) -> tuple[float, float]:
        """Both as numbers, None being the default; 0 and 1/2 where they are not read."""
        if alpha is None:
            alpha = 0.0 if self.alpha is None else self.alpha.default
        if beta is None:
            beta = 0.5 if self.beta is None else self.beta.default
        return alpha, beta

    def kernel_constants(self, alpha: float, beta: float) -> tuple[float, float, float, float]:
        """What row kernels read: of a mixture its weights and their logarithms."""
        if self.mixes is not None:
            weight, rest = self.mixes(alpha, beta)
            return weight, rest, _log_of(weight, rest), _log_of(rest, weight)
        numbers = () if self.constants is None else self.constants(alpha, beta)
        c0, c1, c2, c3 = (*numbers, 0.0, 0.0, 0.0, 0.0)[:4]
        return c0, c1, c2, c3


def _log_of(weight: float, rest: float) -> float:
    return math.log(weight) if weight < 0.5 else math.log1p(-rest)


def _kl(log_a: "Tensor", log_b: "Tensor") -> "Tensor":
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def _weighted(weight: "Tensor", log: "Tensor") -> "Tensor":
    # masked before the product: behind it autograd would multiply 0 by an infinite log
    return weight * log.masked_fill(weight == 0, 0.0)


def _gap(log_p: "Tensor", log_q: "Tensor") -> "Tensor":
    """d, and 0 for a class that both exclude."""
    return (log_p - log_q).masked_fill((log_p == -math.inf) & (log_q == -math.inf), 0.0)


def _log_mixture(x: "Tensor", weight: float, rest: float) -> "Tensor":
    """log(weight e^x + rest) of weights whose sum is 1; it vanishes with x, without rounding."""
    near = x.abs() < 1.0
    small = x.masked_fill(~near, 0.0).expm1().mul(weight).log1p()
    log_weight, log_rest = _log_of(weight, rest), _log_of(rest, weight)
    large = (x + log_weight).logaddexp(x.new_full((), log_rest))
    return small.where(near, large)


def _log_mean(log_p: "Tensor", log_q: "Tensor", weight: float) -> "Tensor":
    return (log_p + math.log(weight)).logaddexp(log_q + math.log1p(-weight))


# --- KLs, and what is made of them


def _forward_kl_terms(log_p, log_q, alpha, beta):
    p = log_p.exp()
    return _weighted(p, log_p - log_q), -p


def _reverse_kl_terms(log_p, log_q, alpha, beta):
    u = -_weighted(log_q.exp(), log_p - log_q)
    return u, u


def _jsd(log_p, log_q, alpha, beta):
    log_m = _log_mean(log_p, log_q, beta)
    return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)


def _jsd_terms(log_p, log_q, alpha, beta):
    # each from its own side: log(p/m) as d - log(m/q) would be the difference of two large numbers
    # where the student gives a class next to nothing
    d = log_p - log_q
    log_beta, log_rest = math.log(beta), math.log1p(-beta)
    log_m_over_p = (log_rest - d).logaddexp(d.new_full((), log_beta))
    log_m_over_q = (log_beta + d).logaddexp(d.new_full((), log_rest))
    u = (beta - 1) * _weighted(log_q.exp(), log_m_over_q)
    return u - beta * _weighted(log_p.exp(), log_m_over_p), u


def _share(part: "Tensor", whole: "Tensor") -> "Tensor":
    """part / whole, 0 where there is nothing."""
    return part / whole.masked_fill(whole == 0, 1.0)


def _skew_forward_kl_terms(log_p, log_q, alpha, beta):
    p, q, d = log_p.exp(), log_q.exp(), _gap(log_p, log_q)
    rest = 1.0 - alpha
    f = -_weighted(p, _log_mixture(-d, rest, alpha))
    return f, rest * rest * q * _share(q - p, alpha * p + rest * q)


def _skew_reverse_kl_terms(log_p, log_q, alpha, beta):
    p, q, d = log_p.exp(), log_q.exp(), _gap(log_p, log_q)
    rest = 1.0 - alpha
    f = -_weighted(q, _log_mixture(d, rest, alpha))
    return f, f + alpha * rest * q * _share(p - q, rest * p + alpha * q)


def _jeffreys_terms(log_p, log_q, alpha, beta):
    p, q, d = log_p.exp(), log_q.exp(), log_p - log_q
    of_q = -_weighted(q, d)
    return _weighted(p, d) + of_q, (q - p) + of_q


# --- others


def _sign(x: "Tensor") -> "Tensor":
    """As `Tensor.sign`, and NaN of NaN."""
    return x.sign() + (x - x)


def _total_variation_terms(log_p, log_q, alpha, beta):
    q = log_q.exp()
    gap = q - log_p.exp()
    return 0.5 * gap.abs(), 0.5 * q * _sign(gap.detach())


def _squared_hellinger(log_p, log_q, alpha, beta):
    return 0.5 * ((0.5 * log_p).exp() - (0.5 * log_q).exp()).square().sum(-1)


def _squared_hellinger_terms(log_p, log_q, alpha, beta):
    root_p, root_q = (0.5 * log_p).exp(), (0.5 * log_q).exp()
    gap = root_p - root_q
    return 0.5 * gap * gap, -0.5 * gap * root_q


def _chi_squared(log_p, log_q, alpha, beta):
    p, q = log_p.exp(), log_q.exp()
    return ((p - q).square() / q).sum(-1)


def _chi_squared_terms(log_p, log_q, alpha, beta):
    p, q, d = log_p.exp(), log_q.exp(), _gap(log_p, log_q)
    # p^2 / q may be finite where p and q are too small to be numbers
    near, gap, squared = d.abs() < 1.0, p - q, (log_p + d).exp()
    small = d.masked_fill(~near, 0.0).expm1()
    f = (gap * small).where(near, (squared - p) - gap)
    return f, (-gap * (2.0 + small)).where(near, q - squared)


def _alpha_beta(log_p, log_q, alpha, beta):
    both = alpha + beta
    p, q = (both * log_p).exp(), (both * log_q).exp()
    mixed = (alpha * log_p + beta * log_q).exp()
    return (alpha / both * p + beta / both * q - mixed).sum(-1) / (alpha * beta)


def _alpha_beta_terms(log_p, log_q, alpha, beta):
    # from the larger of p and q, whose power is the largest of the three
    both, d = alpha + beta, _gap(log_p, log_q)
    top = (both * log_p.maximum(log_q)).exp()
    of_p, distance = d > 0, d.abs()
    less = (-beta * distance).expm1().where(of_p, (-alpha * distance).expm1())
    least = (-both * distance).expm1()
    # with d > 0: p^both = top, q^both = top (1 + least), p^alpha q^beta = top (1 + less)
    gap_p = (-less).where(of_p, least - less)
    gap_q = (least - less).where(of_p, -less)
    f = top * (alpha * gap_p + beta * gap_q) / (alpha * beta * both)
    return f, top * gap_q / alpha


_RECORDS = (
    Divergence(
        name="forward_kl",
        formula="KL(p || q)",
        definition=lambda log_p, log_q, alpha, beta: _kl(log_p, log_q),
        terms=_forward_kl_terms,
        row_sums="mean_under_p",
    ),
    Divergence(
        name="reverse_kl",
        formula="KL(q || p)",
        definition=lambda log_p, log_q, alpha, beta: _kl(log_q, log_p),
        terms=_reverse_kl_terms,
        row_sums="mean_under_q",
    ),
    # generalised JSD of GKD, Agarwal et al. 2024, arXiv 2306.13649
    Divergence(
        name="jsd",
        formula="beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q",
        definition=_jsd,
        terms=_jsd_terms,
        beta=Parameter(0.5, 0.0, 1.0, "[0, 1]"),
        limits=(Limit(None, 0.0, "forward_kl"), Limit(None, 1.0, "reverse_kl")),
        mixes=lambda alpha, beta: (beta, 1.0 - beta),
    ),
    Divergence(
        name="total_variation",
        formula="1/2 sum |p - q|",
        definition=lambda log_p, log_q, alpha, beta: (
            0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)
        ),
        terms=_total_variation_terms,
    ),
    # both skewed KLs: DistiLLM, Ko et al. 2024, arXiv 2402.03898
    Divergence(
        name="skew_forward_kl",
        formula="KL(p || alpha p + (1 - alpha) q)",
        definition=lambda log_p, log_q, alpha, beta: _kl(log_p, _log_mean(log_p, log_q, alpha)),
        terms=_skew_forward_kl_terms,
        alpha=Parameter(0.1, 0.0, 1.0, "[0, 1)"),
        limits=(Limit(0.0, None, "forward_kl"),),
        mixes=lambda alpha, beta: (alpha, 1.0 - alpha),
    ),
    Divergence(
        name="skew_reverse_kl",
        formula="KL(q || (1 - alpha) p + alpha q)",
        definition=lambda log_p, log_q, alpha, beta: _kl(log_q, _log_mean(log_q, log_p, alpha)),
        terms=_skew_reverse_kl_terms,
        alpha=Parameter(0.1, 0.0, 1.0, "[0, 1)"),
        limits=(Limit(0.0, None, "reverse_kl"),),
        mixes=lambda alpha, beta: (1.0 - alpha, alpha),
    ),
    Divergence(
        name="jeffreys",
        formula="KL(p || q) + KL(q || p)",
        definition=lambda log_p, log_q, alpha, beta: _kl(log_p, log_q) + _kl(log_q, log_p),
        terms=_jeffreys_terms,
    ),
    Divergence(
        name="squared_hellinger",
        formula="1/2 sum (sqrt p - sqrt q)^2",
        definition=_squared_hellinger,
        terms=_squared_hellinger_terms,
    ),
    # of Pearson: the student divides
    Divergence(
        name="chi_squared",
        formula="sum (p - q)^2 / q",
        definition=_chi_squared,
        terms=_chi_squared_terms,
    ),
    # Cichocki et al. 2011; for distillation ABKD, Wang et al. 2025, arXiv 2505.04560
    Divergence(
        name="alpha_beta",
        formula="sum (alpha p^s + beta q^s - s p^alpha q^beta) / (alpha beta s), s = alpha + beta",
        definition=_alpha_beta,
        terms=_alpha_beta_terms,
        alpha=Parameter(0.2, 0.0, math.inf, "greater than 0"),
        beta=Parameter(0.7, 0.0, math.inf, "greater than 0"),
        limits=(Limit(1.0, 0.0, "forward_kl"), Limit(0.0, 1.0, "reverse_kl")),
        constants=lambda alpha, beta: (
            *(alpha, beta, alpha + beta),
            1.0 / (alpha * beta * (alpha + beta)),
        ),
    ),
)

DIVERGENCES: Mapping[str, Divergence] = MappingProxyType({r.name: r for r in _RECORDS})
# What help texts say: every name with its formula.
FORMULAS = "; ".join(f"{r.name} = {r.formula}" for r in _RECORDS)


def _readers(parameter: str) -> str:
    return " or ".join(repr(r.name) for r in _RECORDS if getattr(r, parameter) is not None)


# The names that a parameter may stand beside, for messages: "'jsd' or 'alpha_beta'".
WITH_ALPHA, WITH_BETA = _readers("alpha"), _readers("beta")


def _defaults(parameter: str) -> str:
    found: dict[float, list[str]] = {}
    for record in _RECORDS:
        of_record = getattr(record, parameter)
        if of_record is not None:
            found.setdefault(of_record.default, []).append(record.name)
    return ", ".join(f"{value:g} for {' and '.join(names)}" for value, names in found.items())


# What help texts say of them beyond that: the defaults.
ALPHAS, BETAS = _defaults("alpha"), _defaults("beta")


def nearest(name: object, valid: Iterable[str]) -> str:
    """A hint such as "; did you mean 'jsd'?", or nothing."""
    close = difflib.get_close_matches(str(name), list(valid), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def resolve(divergence: str, alpha: float | None, beta: float | None) -> tuple[str, float, float]:
    """Checks the three, and says what they mean: at a limit another name, defaults for None.

    Raises:
        ValueError: naming the argument, what was expected and what came. A parameter beside a
            divergence that does not read it is an error: libraries in which beta alone chooses the
            divergence would mean a JSD.
    """
    if divergence not in DIVERGENCES:
        raise ValueError(
            f"divergence: expected one of {', '.join(DIVERGENCES)}, got {divergence!r}"
            f"{nearest(divergence, DIVERGENCES)}"
        )
    record = DIVERGENCES[divergence]
    for name, value, parameter in (("alpha", alpha, record.alpha), ("beta", beta, record.beta)):
        if value is not None and parameter is None:
            raise ValueError(
                f"{name}: expected it with divergence {_readers(name)} alone, which "
                f"reads it, got {name}={value} with divergence {divergence!r}"
            )
    alpha, beta = record.parameters(alpha, beta)
    for limit in record.limits:
        at_alpha = limit.alpha is None or limit.alpha == alpha
        if at_alpha and (limit.beta is None or limit.beta == beta):
            return limit.name, alpha, beta
    for name, value, parameter in (("alpha", alpha, record.alpha), ("beta", beta, record.beta)):
        if parameter is not None and not parameter.low < value < parameter.high:
            raise ValueError(
                f"{name}: expected a number {_preposition(parameter.text)} with divergence "
                f"{divergence!r}, got {value}{_nearest_limit(record, alpha, beta)}"
            )
    return divergence, alpha, beta


def _preposition(text: str) -> str:
    return f"in {text}" if text[0] in "[(" else text


def _nearest_limit(record: Divergence, alpha: float, beta: float) -> str:
    """A hint at the nearest parameters at which the divergence is another one."""

    def distance(limit: Limit) -> float:
        pairs = ((limit.alpha, alpha), (limit.beta, beta))
        return sum(abs(at - value) for at, value in pairs if at is not None)

    if not record.limits or not math.isfinite(alpha + beta):
        return ""
    return f"; the nearest limit is {min(record.limits, key=distance)}"

"""The divergences of the KD losses, one record each. Importing them needs no torch.

p teacher   q student   d = log p - log q   M rows   V classes

Most divergences D are sums over the classes of addends f with a companion u = q dD/dq; the others
are functions of such sums, with a u as well. Where a constant is added to dD/dq the gradient in the
student's logits z stays the same:

    dD/dz = (u - q sum(u)) / temperature

so u is written such that it vanishes with d, where that is possible: equal rows then have no
gradient, to the last bit.

Two are of the logits themselves, x of the student and y of the teacher, divided by the temperature.
Their u is dD/dx and there is no sum of it: dD/dz = u / temperature.

Names, help, reference, dense yardsticks and tests follow from the records. The kernels have one
branch each: `divergence_terms` of kd_loss/triton_divergences.py and `divergence_terms` of
csrc/include/modxfer/kd_loss_terms.h, for CPUs and CUDA, whose enum in kd_loss.h beside it has the
order of this file.
"""

import dataclasses
import difflib
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, NamedTuple

from modxfer_fast.kernels import divergence_terms as formulas

if TYPE_CHECKING:
    from torch import Tensor


# The option of this name: a divergence, or weights of several by name.
DivergenceOption = str | Mapping[str, float]


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


class OfRow(NamedTuple):
    """A divergence that is a function of sums over the row, or of the logits.

    Attributes:
        sums: (log_p, log_q, alpha) -> `num_sums` [M] over classes [M, V], be they some of the
            row's. Of a function of sums: log S of a sum S; for `value`; for `value`; the total
            variation; the sum of its u.
        value: (sums, alpha) -> D, sum u and `num_numbers` of the row, [M] each. Of a function of
            sums the first, a slope, is 0 where S is far from 1 and its logarithm serves.
        u: (log_p, log_q, alpha, *numbers [M, 1]) -> u [M, V].
        joined: the sums of a row, [M, n], from those of its parts, [G, M, n].
    """

    sums: "Callable[[Tensor, Tensor, float], tuple[Tensor, ...]]"
    value: "Callable[[Iterable[Tensor], float], tuple[Tensor, ...]]"
    u: "Callable[..., Tensor]"
    joined: "Callable[[Tensor], Tensor]"
    num_sums: int = 5
    num_numbers: int = 2


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
            second pass. "of_row": D is another function of sums of the row, `whole` says which.
            "of_logits": D is one of the logits, and u is dD/dx; wherever a function here takes
            log_p and log_q, it then takes y and x.
        whole: what says how, of the last two, which have no terms.
        joins: whether the addends of classes without p are multiples of q, as those of a function
            of p / q times q are: such classes have one addend together.
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
    terms: "Callable[[Tensor, Tensor, float, float], tuple[Tensor, Tensor]] | None" = None
    row_sums: Literal["mean_under_p", "mean_under_q", "normalised", "of_row", "of_logits"] = (
        "normalised"
    )
    whole: OfRow | None = None
    joins: bool = True
    alpha: Parameter | None = None
    beta: Parameter | None = None
    limits: tuple[Limit, ...] = ()
    mixes: Callable[[float, float], tuple[float, float]] | None = None
    constants: Callable[[float, float], tuple[float, ...]] | None = None

    def of_classes(
        self, log_p: "Tensor", log_q: "Tensor", alpha: float, beta: float
    ) -> "tuple[Tensor, Tensor]":
        """f and u, [M, V] each, of a divergence that is a sum over the classes."""
        assert self.terms is not None
        return self.terms(log_p, log_q, alpha, beta)

    def of_rows(
        self, log_p: "Tensor", log_q: "Tensor", alpha: float, beta: float
    ) -> "tuple[Tensor, Tensor]":
        """D [M] and u [M, V], of any divergence."""
        if self.whole is not None:
            divergence, _, *numbers = self.whole.value(self.whole.sums(log_p, log_q, alpha), alpha)
            of_rows = [number[..., None] for number in numbers]
            return divergence, self.whole.u(log_p, log_q, alpha, *of_rows)
        f, u = self.of_classes(log_p, log_q, alpha, beta)
        return f.sum(-1), u

    def operand(self, z: "Tensor") -> "Tensor":
        """What the functions above take of a whole row's logits z [..., V] / temperature.

        It is NaN of a row without a class.
        """
        if self.row_sums == "of_logits":
            return z.masked_fill((z == -math.inf).all(-1, keepdim=True), math.nan)
        return z.log_softmax(-1)

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
            return weight, rest, formulas.log_of(weight, rest), formulas.log_of(rest, weight)
        numbers = () if self.constants is None else self.constants(alpha, beta)
        c0, c1, c2, c3 = (*numbers, 0.0, 0.0, 0.0, 0.0)[:4]
        return c0, c1, c2, c3


_RECORDS = (
    Divergence(
        name="forward_kl",
        formula="KL(p || q)",
        definition=lambda log_p, log_q, alpha, beta: formulas.kl(log_p, log_q),
        terms=formulas.forward_kl_terms,
        row_sums="mean_under_p",
    ),
    Divergence(
        name="reverse_kl",
        formula="KL(q || p)",
        definition=lambda log_p, log_q, alpha, beta: formulas.kl(log_q, log_p),
        terms=formulas.reverse_kl_terms,
        row_sums="mean_under_q",
    ),
    # generalised JSD of GKD, Agarwal et al. 2024, arXiv 2306.13649
    Divergence(
        name="jsd",
        formula="beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q",
        definition=formulas.jsd,
        terms=formulas.jsd_terms,
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
        terms=formulas.total_variation_terms,
    ),
    # both skewed KLs: DistiLLM, Ko et al. 2024, arXiv 2402.03898
    Divergence(
        name="skew_forward_kl",
        formula="KL(p || alpha p + (1 - alpha) q)",
        definition=lambda log_p, log_q, alpha, beta: formulas.kl(
            log_p, formulas.log_mean(log_p, log_q, alpha)
        ),
        terms=formulas.skew_forward_kl_terms,
        alpha=Parameter(0.1, 0.0, 1.0, "[0, 1)"),
        limits=(Limit(0.0, None, "forward_kl"),),
        mixes=lambda alpha, beta: (alpha, 1.0 - alpha),
    ),
    Divergence(
        name="skew_reverse_kl",
        formula="KL(q || (1 - alpha) p + alpha q)",
        definition=lambda log_p, log_q, alpha, beta: formulas.kl(
            log_q, formulas.log_mean(log_q, log_p, alpha)
        ),
        terms=formulas.skew_reverse_kl_terms,
        alpha=Parameter(0.1, 0.0, 1.0, "[0, 1)"),
        limits=(Limit(0.0, None, "reverse_kl"),),
        mixes=lambda alpha, beta: (1.0 - alpha, alpha),
    ),
    Divergence(
        name="jeffreys",
        formula="KL(p || q) + KL(q || p)",
        definition=lambda log_p, log_q, alpha, beta: (
            formulas.kl(log_p, log_q) + formulas.kl(log_q, log_p)
        ),
        terms=formulas.jeffreys_terms,
    ),
    Divergence(
        name="squared_hellinger",
        formula="1/2 sum (sqrt p - sqrt q)^2",
        definition=formulas.squared_hellinger,
        terms=formulas.squared_hellinger_terms,
    ),
    # of Pearson: the student divides
    Divergence(
        name="chi_squared",
        formula="sum (p - q)^2 / q",
        definition=formulas.chi_squared,
        terms=formulas.chi_squared_terms,
    ),
    # Cichocki et al. 2011; for distillation ABKD, Wang et al. 2025, arXiv 2505.04560
    Divergence(
        name="alpha_beta",
        formula="sum (alpha p^s + beta q^s - s p^alpha q^beta) / (alpha beta s), s = alpha + beta",
        definition=formulas.alpha_beta,
        terms=formulas.alpha_beta_terms,
        joins=False,
        alpha=Parameter(0.2, 0.0, math.inf, "greater than 0"),
        beta=Parameter(0.7, 0.0, math.inf, "greater than 0"),
        limits=(Limit(1.0, 0.0, "forward_kl"), Limit(0.0, 1.0, "reverse_kl")),
        constants=lambda alpha, beta: (
            *(alpha, beta, alpha + beta),
            1.0 / (alpha * beta * (alpha + beta)),
        ),
    ),
    Divergence(
        name="renyi",
        formula="log(sum p^alpha q^(1 - alpha)) / (alpha - 1)",
        definition=formulas.renyi,
        whole=OfRow(
            formulas.renyi_sums,
            formulas.renyi_value,
            formulas.renyi_u,
            functools.partial(formulas.added_up, num_logs=1),
        ),
        row_sums="of_row",
        alpha=Parameter(0.5, 0.0, math.inf, "greater than 0"),
        limits=(Limit(1.0, None, "forward_kl"),),
        constants=lambda alpha, beta: (alpha, 1.0 / (alpha - 1.0)),
    ),
    # of speculative decoding: Samarin et al., arXiv 2602.23881
    Divergence(
        name="negative_log_acceptance",
        formula="-log sum min(p, q)",
        definition=formulas.negative_log_acceptance,
        whole=OfRow(
            formulas.negative_log_acceptance_sums,
            formulas.negative_log_acceptance_value,
            formulas.negative_log_acceptance_u,
            functools.partial(formulas.added_up, num_logs=2),
        ),
        row_sums="of_row",
    ),
    Divergence(
        name="lk_hybrid",
        formula="w KL(p || q) + (1 - w) 1/2 sum |p - q|, w = exp(-alpha sum min(p, q)), a constant "
        "of the gradient",
        definition=formulas.lk_hybrid,
        whole=OfRow(
            formulas.lk_hybrid_sums,
            formulas.lk_hybrid_value,
            formulas.lk_hybrid_u,
            formulas.added_up,
        ),
        row_sums="of_row",
        alpha=Parameter(3.0, 0.0, math.inf, "not less than 0"),
        limits=(Limit(0.0, None, "forward_kl"),),
        constants=lambda alpha, beta: (alpha,),
    ),
    Divergence(
        name="logits_mse",
        formula="1/V sum (x - y)^2 of the logits",
        definition=formulas.logits_mse,
        whole=OfRow(
            formulas.logits_mse_sums,
            formulas.logits_mse_value,
            formulas.logits_mse_u,
            formulas.added_up,
            num_sums=2,
            num_numbers=1,
        ),
        row_sums="of_logits",
    ),
    Divergence(
        name="logits_cosine",
        formula="1 - x y / (|x| |y|) of the logits",
        definition=formulas.logits_cosine,
        whole=OfRow(
            formulas.logits_cosine_sums,
            formulas.logits_cosine_value,
            formulas.logits_cosine_u,
            formulas.logits_cosine_joined,
            num_sums=3,
            num_numbers=3,
        ),
        row_sums="of_logits",
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


@functools.lru_cache(maxsize=64)
def weighted_sum(
    names: tuple[str, ...], weights: tuple[float, ...], alpha: float | None, beta: float | None
) -> Divergence:
    """A record of sum w D; alpha and beta go to those that read them, None being their default."""
    parts = [
        (weight, DIVERGENCES[name], DIVERGENCES[name].parameters(alpha, beta))
        for name, weight in zip(names, weights, strict=True)
    ]

    def definition(log_p, log_q, *_):
        return sum(w * record.definition(log_p, log_q, *own) for w, record, own in parts)

    def terms(log_p, log_q, *_):
        f, u = 0.0, 0.0
        for weight, record, own in parts:
            f_part, u_part = record.terms(log_p, log_q, *own)
            if record.row_sums == "mean_under_p":
                u_part = u_part + log_q.exp()  # which vanishes with d, unlike -p alone
            f, u = f + weight * f_part, u + weight * u_part
        return f, u

    formula = " + ".join(f"{w:g} ({record.formula})" for w, record, _ in parts)
    joins = all(record.joins for _, record, _ in parts)
    return Divergence("+".join(names), formula, definition, terms, joins=joins)


def nearest(name: object, valid: Iterable[str]) -> str:
    """A hint such as "; did you mean 'jsd'?", or nothing."""
    close = difflib.get_close_matches(str(name), list(valid), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def resolve_sum(
    names: Iterable[str], weights: Iterable[float], alpha: float | None, beta: float | None
) -> dict[str, float]:
    """The weights of a sum by name, each checked and `resolve`d; those of weight 0 are left out.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    found: dict[str, float] = {}
    readers: set[str] = set()
    for name, weight in zip(names, weights, strict=True):
        if name not in DIVERGENCES:
            resolve(name, None, None)
        record = DIVERGENCES[name]
        if record.row_sums in ("of_row", "of_logits"):
            of = "the logits" if record.row_sums == "of_logits" else "such a sum"
            raise ValueError(
                f"divergence: expected sums over the classes as parts of a weighted sum, "
                f"got {name!r}, which is a function of {of}"
            )
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise TypeError(
                f"divergence: expected a number as weight of {name!r}, got {type(weight).__name__}"
            )
        if not 0.0 <= weight < math.inf:
            raise ValueError(
                f"divergence: expected weights of at least 0, got {weight} for {name!r}"
            )
        own = {"alpha": alpha if record.reads_alpha else None}
        own["beta"] = beta if record.reads_beta else None
        readers |= {parameter for parameter in own if getattr(record, parameter) is not None}
        resolved, *_ = resolve(name, **own)
        if weight > 0:
            found[resolved] = found.get(resolved, 0.0) + float(weight)
    if not found:
        raise ValueError(
            "divergence: expected a name or weights by name, one of them positive, got none"
        )
    for parameter, value in (("alpha", alpha), ("beta", beta)):
        if value is not None and parameter not in readers:
            raise ValueError(
                f"{parameter}: expected it with divergence {_readers(parameter)} alone, which "
                f"reads it, got {parameter}={value} with {' and '.join(map(repr, names))}"
            )
    return found


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

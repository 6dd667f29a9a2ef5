"""From the candidates of a room to rows: check against fp64, measure memory, time what is right."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .memory import peak_mib
from .results import Row
from .shapes import Shape
from .timing import Effort, Step, Timing, interleave

# Largest relative error (Frobenius norm) of loss and gradients that still is the same function.
BUDGET = {torch.float32: 1e-4, torch.float16: 3e-3, torch.bfloat16: 3e-3}
# A candidate that rounds logits to half precision loses most digits of a small difference of
# distributions. That is how it works, not a mistake: it is timed, and its error stands beside.
HALF_LOGITS_BUDGET = 0.5


@dataclass(frozen=True)
class Case:
    """One problem: what is computed, where, and in which precision."""

    shape: Shape
    dtype: torch.dtype
    device: str
    divergence: str
    beta: float = 0.5


@dataclass(frozen=True)
class Candidate:
    """An implementation that takes part.

    Attributes:
        step: one forward and backward; returns the loss and the gradients by name and keeps none.
            None where it cannot run.
        outputs: the names that `step` must return.
        floor: name of the floor it is compared with.
        fp32_logits: whether its softmax sees fp32 logits also for half-precision inputs.
        why_not: the reason when `step` is None.
    """

    name: str
    step: Callable[[], Mapping[str, Tensor]] | None
    outputs: tuple[str, ...]
    floor: str
    fp32_logits: bool = True
    why_not: str = ""


@dataclass(frozen=True)
class Lineup:
    """Who takes part in a case.

    Attributes:
        floors: what no implementation can beat, into preallocated outputs, by name.
        truth: fp64 loss and gradients by name; computed once.
        has_heads: False for a room that starts from logits, where D_s and D_t play no part.
    """

    candidates: list[Candidate]
    floors: dict[str, Step]
    truth: Callable[[], Mapping[str, Tensor]]
    has_heads: bool = True


@dataclass(frozen=True)
class Check:
    ok: bool
    text: str


def measure(
    room: str, case: Case, lineup: Lineup, effort: Effort, say: Callable[[str], None]
) -> list[Row]:
    """Rows of all candidates and floors, in their order.

    Args:
        say: told what is being done, one short line at a time.
    """
    say("truth in fp64")
    truth = lineup.truth()
    checks, peaks = {}, {}
    for candidate in lineup.candidates:
        say(f"check {candidate.name}")
        checks[candidate.name] = check(candidate, truth, case.dtype)
        if checks[candidate.name].ok:
            peaks[candidate.name] = peak_mib(candidate.step, case.device)
    del truth
    steps = dict(lineup.floors)
    steps |= {c.name: c.step for c in lineup.candidates if checks[c.name].ok}
    times = interleave(
        steps, case.device, effort, lambda done: say(f"timing {len(steps)} steps, round {done + 1}")
    )
    row = functools.partial(_row, room, case, lineup.has_heads)
    rows = [row(name, "floor", times[name], times[name]) for name in lineup.floors]
    for candidate in lineup.candidates:
        name, floor = candidate.name, times[candidate.floor]
        rows.append(row(name, checks[name].text, times.get(name), floor, peaks.get(name)))
    return rows


def check(candidate: Candidate, truth: Mapping[str, Tensor], dtype: torch.dtype) -> Check:
    """Runs the candidate once and compares everything it returns with the truth."""
    if candidate.step is None:
        return Check(False, candidate.why_not)
    try:
        results = candidate.step()
    except Exception as error:  # a peer may fail in any way, and the others still have to run
        return Check(False, f"fail {type(error).__name__}: {str(error).splitlines()[0][:80]}")
    if set(results) != set(candidate.outputs):
        return Check(False, f"fail returned {', '.join(results)}")
    errors = {name: relative_error(results[name], truth[name]) for name in candidate.outputs}
    worst = max(errors, key=errors.get)
    half_logits = dtype != torch.float32 and not candidate.fp32_logits
    budget = HALF_LOGITS_BUDGET if half_logits else BUDGET[dtype]
    ok = errors[worst] <= budget
    return Check(ok, f"{'pass' if ok else 'fail'} {worst} {errors[worst]:.1e} of {budget:.0e}")


def relative_error(result: Tensor, truth: Tensor) -> float:
    """|result - truth| / |truth| in the Frobenius norm; inf for a wrong shape or an inf or NaN."""
    if result.shape != truth.shape or not result.isfinite().all():
        return float("inf")
    return ((result.double() - truth).norm() / truth.norm()).item()


def _row(
    room: str,
    case: Case,
    has_heads: bool,
    impl: str,
    check_text: str,
    time: Timing | None,
    floor: Timing,
    peak: float | None = None,
) -> Row:
    shape = case.shape
    return Row(
        room=room,
        impl=impl,
        device=case.device,
        dtype=str(case.dtype).removeprefix("torch."),
        N=shape.N,
        D_s=shape.D_s if has_heads else None,
        D_t=shape.D_t if has_heads else None,
        V=shape.V,
        divergence=case.divergence,
        check=check_text,
        time_ms=time and time.median_ms,
        time_ms_iqr=time and time.iqr_ms,
        floor_ms=floor.median_ms,
        ratio_to_floor=time and time.median_ms / floor.median_ms,
        peak_mib=peak,
    )

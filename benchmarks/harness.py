"""From the candidates of a room to rows: check against fp64, count, time what is right."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .counting import LAUNCHES_OF, launches, saved_mib
from .memory import peak_mib
from .results import Row
from .roofline import Roof, Work
from .rooms import Case
from .timing import Effort, Step, Timing, interleave

# Largest relative error (Frobenius norm) of results and gradients that still is the same function.
BUDGET = {torch.float32: 1e-4, torch.float16: 3e-3, torch.bfloat16: 3e-3}
# A candidate that rounds what is wide to half precision, logits or projected states, loses most
# digits of a small difference. That is how it works, not a mistake: it is timed, and its error
# stands beside.
COARSE_BUDGET = {torch.float32: 1e-4, torch.float16: 0.5, torch.bfloat16: 0.5}

Truth = Callable[[], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Floor:
    """What an implementation is compared with.

    Attributes:
        step: the least that must be done, into preallocated outputs; or, where `is_training`, a
            forward and backward as a candidate's, whose memory is of interest too.
        work: what it does.
        weights: as a candidate's, where `is_training`.
    """

    step: Step
    work: Work
    is_training: bool = False
    weights: Sequence[Tensor] = ()


@dataclass(frozen=True)
class Candidate:
    """An implementation that takes part.

    Attributes:
        step: one forward and backward; returns results and gradients by name and keeps none.
            None where it cannot run.
        outputs: the names that `step` must return.
        floor: name of the floor it is compared with.
        work: of the formula that it computes; None for the floor's.
        weights: parameters, which do not count as saved for the backward.
        budget: largest relative error by dtype.
        check_step: what is checked in place of `step`, where `step` draws random numbers.
        truth: what it is checked against in place of the line-up's.
        why_not: the reason when `step` is None.
    """

    name: str
    step: Callable[[], Mapping[str, Tensor]] | None
    outputs: tuple[str, ...]
    floor: str
    work: Work | None = None
    weights: Sequence[Tensor] = ()
    budget: Mapping[torch.dtype, float] = field(default_factory=lambda: BUDGET)
    check_step: Callable[[], Mapping[str, Tensor]] | None = None
    truth: Truth | None = None
    why_not: str = ""


@dataclass(frozen=True)
class Lineup:
    """Who takes part in a case.

    Attributes:
        problem: sizes, variant and options as rows tell them.
        floors: what implementations are compared with, by name.
        truth: fp64 results and gradients by name.
    """

    problem: Mapping[str, int | float | str]
    candidates: list[Candidate]
    floors: Mapping[str, Floor]
    truth: Truth


@dataclass(frozen=True)
class Check:
    ok: bool
    text: str


@dataclass(frozen=True)
class Counts:
    """Memory and launches of one step; null where they are not measured."""

    peak_mib: float | None = None
    saved_mib: float | None = None
    launches: int | None = None


def measure(
    room: str, case: Case, lineup: Lineup, effort: Effort, roof: Roof, say: Callable[[str], None]
) -> list[Row]:
    """Rows of all candidates and floors, in their order.

    Args:
        roof: of this device in the case's dtype, measured in the same run.
        say: told what is being done, one short line at a time.
    """
    # the same functions were compiled for earlier cases; past a limit they would run uncompiled
    torch.compiler.reset()
    checks = _checks(case, lineup, say)
    right = [c for c in lineup.candidates if checks[c.name].ok]
    counts = {}
    for name, floor in lineup.floors.items():
        say(f"count {name}")
        counts[name] = _counts(floor.step, floor.weights, case.device, floor.is_training)
    for candidate in right:
        say(f"count {candidate.name}")
        counts[candidate.name] = _counts(candidate.step, candidate.weights, case.device, True)
    steps = {name: floor.step for name, floor in lineup.floors.items()}
    steps |= {c.name: c.step for c in right}
    times = interleave(
        steps, case.device, effort, lambda done: say(f"timing {len(steps)} steps, round {done + 1}")
    )

    row = functools.partial(_row, room, case, lineup.problem, roof)
    rows = [
        row(name, "floor", times[name], name, times[name], floor.work, counts[name])
        for name, floor in lineup.floors.items()
    ]
    for candidate in lineup.candidates:
        name, floor = candidate.name, candidate.floor
        work = candidate.work or lineup.floors[floor].work
        counted = counts.get(name, Counts())
        rows.append(
            row(name, checks[name].text, times.get(name), floor, times[floor], work, counted)
        )
    return rows


def check(candidate: Candidate, truth: Mapping[str, Tensor], dtype: torch.dtype) -> Check:
    """Runs the candidate once and compares everything it returns with the truth."""
    if candidate.step is None:
        return Check(False, candidate.why_not)
    try:
        results = (candidate.check_step or candidate.step)()
    except Exception as error:  # a peer may fail in any way, and the others still have to run
        message = (str(error).splitlines() or [""])[0][:80]
        return Check(False, f"fail {type(error).__name__}: {message}")
    if set(results) != set(candidate.outputs):
        return Check(False, f"fail returned {', '.join(results)}")
    errors = {name: relative_error(results[name], truth[name]) for name in candidate.outputs}
    worst = max(errors, key=errors.get)
    budget = candidate.budget[dtype]
    ok = errors[worst] <= budget
    return Check(ok, f"{'pass' if ok else 'fail'} {worst} {errors[worst]:.1e} of {budget:.0e}")


def relative_error(result: Tensor, truth: Tensor) -> float:
    """|result - truth| / |truth| in the Frobenius norm; inf for a wrong shape or an inf or NaN."""
    if result.shape != truth.shape or not result.isfinite().all():
        return float("inf")
    return ((result.double() - truth).norm() / truth.norm()).item()


def _checks(case: Case, lineup: Lineup, say: Callable[[str], None]) -> dict[str, Check]:
    # one truth at a time: in fp64 they are the largest tensors of the run
    by_truth: dict[Truth, list[Candidate]] = {lineup.truth: []}
    for candidate in lineup.candidates:
        by_truth.setdefault(candidate.truth or lineup.truth, []).append(candidate)
    checks = {}
    for make_truth, candidates in by_truth.items():
        if not candidates:
            continue
        say("truth in fp64")
        truth = make_truth()
        for candidate in candidates:
            say(f"check {candidate.name}")
            checks[candidate.name] = check(candidate, truth, case.dtype)
        del truth
    return checks


def _counts(step: Step, weights: Sequence[Tensor], device: str, is_training: bool) -> Counts:
    step()  # what compiles does so here
    launched = launches(step, device)
    if not is_training:
        return Counts(launches=launched)
    return Counts(peak_mib(step, device), saved_mib(step, weights), launched)


def _row(
    room: str,
    case: Case,
    problem: Mapping[str, int | float | str],
    roof: Roof,
    impl: str,
    check_text: str,
    time: Timing | None,
    floor: str,
    floor_time: Timing,
    work: Work,
    counts: Counts,
) -> Row:
    return Row(
        room=room,
        impl=impl,
        device=case.device,
        dtype=str(case.dtype).removeprefix("torch."),
        problem=problem,
        check=check_text,
        time_ms=time and time.median_ms,
        time_ms_iqr=time and time.iqr_ms,
        floor_ms=floor_time.median_ms,
        ratio_to_floor=time and time.median_ms / floor_time.median_ms,
        peak_mib=counts.peak_mib,
        floor=floor,
        flops=work.flops,
        bytes=work.bytes,
        predicted_ms=roof.predicted_ms(work),
        saved_mib=counts.saved_mib,
        launches=counts.launches,
        launches_of=None if counts.launches is None else LAUNCHES_OF[case.device],
    )

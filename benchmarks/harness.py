"""From the candidates of a room to rows: check against fp64, count, time; one after another."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.results import Row
from benchmarks.rooms import Case
from modxfer_fast.measure.counting import LAUNCHES_OF, launches, saved_mib
from modxfer_fast.measure.memory import peak_mib
from modxfer_fast.measure.roofline import Roof, Work
from modxfer_fast.measure.timing import Effort, Step, Timing, graphed, interleave

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

    @property
    def is_ours(self) -> bool:
        return self.name.startswith("ours")


@dataclass(frozen=True)
class Lineup:
    """Who takes part in a case.

    Attributes:
        problem: sizes, variant and options as rows tell them.
        floors: what implementations are compared with, by name.
        truth: fp64 results and gradients by name.
        graphs: on a GPU each candidate is also timed as a CUDA graph: the step is so short that
            Python's launches may take longer.
    """

    problem: Mapping[str, int | float | str]
    candidates: list[Candidate]
    floors: Mapping[str, Floor]
    truth: Truth
    graphs: bool = False


@dataclass(frozen=True)
class Check:
    """What a row says of an implementation, and whether its times mean something.

    One over its accuracy budget is timed all the same, and the row says so: the time of a result
    that is off in its third digit is worth knowing, one of NaN is not.
    """

    text: str
    is_timed: bool


@dataclass(frozen=True)
class Counts:
    """Memory and launches of one step; null where they are not measured."""

    peak_mib: float | None = None
    saved_mib: float | None = None
    launches: int | None = None


def measure(
    room: str,
    case: Case,
    lineup: Lineup,
    effort: Effort,
    roof: Roof,
    say: Callable[[str], None],
    is_over: Callable[[], bool] = lambda: False,
) -> Iterator[Row]:
    """A row of each floor and candidate as soon as it is measured, ours before their peers.

    A candidate is timed in turn with its floor. Where `lineup.graphs`, its row comes a second
    time, with the time of its CUDA graph.

    Args:
        effort: `budget_s` is shared by all.
        roof: of this device in the case's dtype, measured in the same run.
        say: told what is being done, one short line at a time.
        is_over: asked before each peer; once it is true, the rest is named and not run.
    """
    # the same functions were compiled for earlier cases; past a limit they would run uncompiled
    torch.compiler.reset()
    candidates = sorted(lineup.candidates, key=lambda candidate: not candidate.is_ours)
    parts = len(lineup.floors) + len(candidates)
    effort = dataclasses.replace(effort, budget_s=effort.budget_s / parts)
    row = functools.partial(_row, room, case, lineup.problem, roof)
    for name, floor in lineup.floors.items():
        say(f"time {name}")
        counts = _counts(floor.step, floor.weights, case.device, floor.is_training)
        (timing,) = interleave({name: floor.step}, case.device, effort).values()
        yield row(name, "floor", name, floor.work, timing, timing, counts)
    truth = _Truths(lineup.truth, say)
    for candidate in candidates:
        name, floor = candidate.name, lineup.floors[candidate.floor]
        unmeasured = functools.partial(
            row, name, floor=candidate.floor, work=candidate.work or floor.work
        )
        if not candidate.is_ours and is_over():
            yield unmeasured("not reached in the time given")
            continue
        say(f"check {name}")
        checked = check(candidate, truth.of(candidate), case.dtype)
        if not checked.is_timed:
            yield unmeasured(checked.text)
            continue
        say(f"time {name}")
        try:
            counts = _counts(candidate.step, candidate.weights, case.device, True)
            steps = {candidate.floor: floor.step, name: candidate.step}
            times = interleave(steps, case.device, effort)
        except Exception as error:  # a peer may fail in any way, and the others still have to run
            yield unmeasured(_failure(error))
            continue
        measured = unmeasured(
            checked.text, timing=times[name], floor_timing=times[candidate.floor], counts=counts
        )
        yield measured
        if lineup.graphs and case.device == "cuda":
            say(f"time {name} as a graph")
            yield dataclasses.replace(measured, graph_ms=_graph_ms(candidate.step, effort))


def check(
    candidate: Candidate, truth: Callable[[], Mapping[str, Tensor]], dtype: torch.dtype
) -> Check:
    """Runs the candidate once and compares everything it returns with the truth."""
    if candidate.step is None:
        return Check(candidate.why_not, False)
    try:
        results = (candidate.check_step or candidate.step)()
        if set(results) != set(candidate.outputs):
            return Check(f"fail returned {', '.join(results)}", False)
        expected = truth()
        errors = {name: relative_error(results[name], expected[name]) for name in candidate.outputs}
    except Exception as error:  # a peer may fail in any way, and the others still have to run
        return Check(_failure(error), False)
    worst = max(errors, key=errors.get)
    budget, error = candidate.budget[dtype], errors[worst]
    word = "pass" if error <= budget else "over" if math.isfinite(error) else "fail"
    return Check(f"{word} {worst} {error:.1e} of {budget:.0e}", word != "fail")


def relative_error(result: Tensor, truth: Tensor) -> float:
    """|result - truth| / |truth| in the Frobenius norm; inf for a wrong shape or an inf or NaN."""
    if result.shape != truth.shape or not result.isfinite().all():
        return float("inf")
    return ((result.double() - truth).norm() / truth.norm()).item()


class _Truths:
    """One truth at a time: in fp64 they are the largest tensors of the run."""

    def __init__(self, default: Truth, say: Callable[[str], None]):
        self._default, self._say = default, say
        self._made_by: Truth | None = None
        self._values: Mapping[str, Tensor] = {}

    def of(self, candidate: Candidate) -> Truth:
        make = candidate.truth or self._default

        def truth() -> Mapping[str, Tensor]:
            if make is not self._made_by:
                self._say("truth in fp64")
                self._values = {}
                self._values, self._made_by = make(), make
            return self._values

        return truth


def _failure(error: Exception) -> str:
    message = (str(error).splitlines() or [""])[0][:80]
    return f"fail {type(error).__name__}: {message}"


def _graph_ms(step: Step, effort: Effort) -> float | None:
    """Median time of the step's CUDA graph; None where it cannot be captured."""
    try:
        replay = graphed(step)
        (timing,) = interleave({"graph": replay}, "cuda", effort).values()
    except Exception:  # what a peer does may not be allowed in a graph
        return None
    return timing.median_ms


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
    floor: str,
    work: Work,
    timing: Timing | None = None,
    floor_timing: Timing | None = None,
    counts: Counts = Counts(),
) -> Row:
    return Row(
        room=room,
        impl=impl,
        device=case.device,
        dtype=str(case.dtype).removeprefix("torch."),
        problem=problem,
        check=check_text,
        time_ms=timing and timing.median_ms,
        time_ms_iqr=timing and timing.iqr_ms,
        floor_ms=floor_timing and floor_timing.median_ms,
        ratio_to_floor=timing and timing.median_ms / floor_timing.median_ms,
        peak_mib=counts.peak_mib,
        floor=floor,
        flops=work.flops,
        bytes=work.bytes,
        predicted_ms=roof.predicted_ms(work),
        saved_mib=counts.saved_mib,
        launches=counts.launches,
        launches_of=None if counts.launches is None else LAUNCHES_OF[case.device],
        host_ms=timing and timing.host_ms,
    )

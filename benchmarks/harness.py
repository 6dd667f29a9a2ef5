"""From the candidates of a room to rows: check against fp64, count, time; one after another."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.results import Row
from benchmarks.rooms import Candidate, Case, Lineup, Results
from modxfer_fast.measure.counting import LAUNCHES_OF, launches, saved_mib
from modxfer_fast.measure.memory import peak_mib
from modxfer_fast.measure.roofline import Roof, Work
from modxfer_fast.measure.timing import Effort, Step, Timing, graphed, interleave


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
    truths: dict[Callable[[], Results], Results] = {}

    def truth(make: Callable[[], Results]) -> Results:
        if make not in truths:
            say("truth in fp64")
            truths.clear()  # in fp64 they are the largest tensors of the run: one at a time
            truths[make] = make()
        return truths[make]

    def row(
        impl: str, check: str, floor: str, work: Work, steps: Sequence[Work] = (), **measured: Any
    ) -> Row:
        dtype = str(case.dtype).removeprefix("torch.")
        return Row(
            *(room, impl, case.device, dtype, lineup.problem, check),
            floor=floor,
            flops=work.flops,
            bytes=work.bytes,
            predicted_ms=roof.predicted_ms(*(steps or [work])),
            **measured,
        )

    for name, floor in lineup.floors.items():
        say(f"time {name}")
        counts = _counts(floor.step, case.device, floor.weights or None)
        (timing,) = interleave({name: floor.step}, case.device, effort).values()
        yield row(name, "floor", name, floor.work, **counts, **_times(timing, timing))
    for candidate in candidates:
        name, floor = candidate.name, lineup.floors[candidate.floor]
        unmeasured = functools.partial(
            *(row, name),
            floor=candidate.floor,
            work=candidate.work or floor.work,
            steps=candidate.steps,
        )
        if not candidate.is_ours and is_over():
            yield unmeasured("not reached in the time given")
            continue
        say(f"check {name}")
        expected = functools.partial(truth, candidate.truth or lineup.truth)
        checked = check(candidate, expected, case.dtype)
        if not checked.startswith(("pass", "over")):
            yield unmeasured(checked)
            continue
        say(f"time {name}")
        try:
            counts = _counts(candidate.step, case.device, candidate.weights)
            steps = {candidate.floor: floor.step, name: candidate.step}
            times = interleave(steps, case.device, effort)
        except Exception as error:  # a peer may fail in any way, and the others still have to run
            yield unmeasured(_failure(error))
            continue
        measured = unmeasured(checked, **counts, **_times(times[name], times[candidate.floor]))
        yield measured
        if lineup.graphs and case.device == "cuda":
            say(f"time {name} as a graph")
            yield dataclasses.replace(measured, graph_ms=_graph_ms(candidate.step, effort))


def check(candidate: Candidate, truth: Callable[[], Results], dtype: torch.dtype) -> str:
    """Runs the candidate once and compares everything it returns with the truth.

    "pass", or "over" for one over its accuracy budget, which is timed all the same: the time of a
    result that is off in its third digit is worth knowing. With anything else it is not.
    """
    if candidate.step is None:
        return candidate.why_not
    try:
        results = (candidate.check_step or candidate.step)()
        expected = truth()
        if set(results) != set(candidate.outputs or expected):
            return f"fail returned {', '.join(results)}"
        errors = {name: relative_error(result, expected[name]) for name, result in results.items()}
    except Exception as error:  # a peer may fail in any way, and the others still have to run
        return _failure(error)
    worst = max(errors, key=errors.__getitem__)
    budget, error = candidate.budget[dtype], errors[worst]
    word = "pass" if error <= budget else "over" if math.isfinite(error) else "fail"
    return f"{word} {worst} {error:.1e} of {budget:.0e}"


def relative_error(result: Tensor, truth: Tensor) -> float:
    """|result - truth| / |truth| in the Frobenius norm; inf for a wrong shape or an inf or NaN."""
    if result.shape != truth.shape or not result.isfinite().all():
        return float("inf")
    return ((result.double() - truth).norm() / truth.norm()).item()


def _failure(error: Exception) -> str:
    message = (str(error).splitlines() or [""])[0][:80]
    return f"fail {type(error).__name__}: {message}"


def _graph_ms(step: Step, effort: Effort) -> float | None:
    """Median time of the step's CUDA graph; None where it cannot be captured."""
    try:
        (timing,) = interleave({"graph": graphed(step)}, "cuda", effort).values()
    except Exception:  # what a peer does may not be allowed in a graph
        return None
    return timing.median_ms


def _counts(step: Step, device: str, weights: Sequence[Tensor] | None) -> dict[str, Any]:
    """Columns of launches and, unless weights are None, of memory."""
    step()  # what compiles does so here
    launched = launches(step, device)
    of = None if launched is None else LAUNCHES_OF[device]
    counts = {"launches": launched, "launches_of": of}
    if weights is not None:
        counts |= {"peak_mib": peak_mib(step, device), "saved_mib": saved_mib(step, weights)}
    return counts


def _times(timing: Timing, floor: Timing) -> dict[str, Any]:
    return {
        "time_ms": timing.median_ms,
        "time_ms_iqr": timing.iqr_ms,
        "floor_ms": floor.median_ms,
        "ratio_to_floor": timing.median_ms / floor.median_ms,
        "host_ms": timing.host_ms,
    }

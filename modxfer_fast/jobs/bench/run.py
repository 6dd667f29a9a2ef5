"""The variants of a room, one after another: environment, roof, rows, tables."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType

import torch

from modxfer_fast.errors import UserError
from modxfer_fast.jobs.bench.load import load_benchmarks
from modxfer_fast.measure import environment, roofline, timing


def run_bench(
    name: str,
    module: ModuleType,
    *,
    device: str | None,
    dtype: str | None,
    shape: str | None,
    sizes: Mapping[str, int | None],
    variants: Sequence[str],
    options: Mapping[str, float],
    seconds: float | None,
    quick: bool,
    json: Path | None,
    csv: Path | None,
) -> int:
    """Measure and show every variant; files have each row as soon as it is there.

    Args:
        name, module: of the room.
        device, dtype, shape: None for what the machine and the room have.
        sizes: in place of the shape's, where not None.
        seconds: of timing a variant, beyond the least rounds.
    Returns:
        0 when our backends pass their check, 1 when one of them does not.
    Raises:
        UserError: a value that the room or this machine does not have.
    """
    benchmarks = load_benchmarks()
    console, results = benchmarks("console"), benchmarks("results")
    device = _device(device)
    with _user_errors():
        for variant in variants:
            module.ROOM.check_variant(variant)
        of_shape = module.ROOM.shape(shape or module.ROOM.default_shape[device])
        given = {size: value for size, value in sizes.items() if value is not None}
        of_shape = dataclasses.replace(of_shape, **given)
    effort = _effort(seconds, timing.QUICK if quick else timing.Effort())
    precision = getattr(torch, dtype or ("bfloat16" if device == "cuda" else "float32"))

    with console.progress() as say:
        say("roof of this machine: a copy and a matrix product")
        roof = roofline.measure_roof(device, precision)
    described = environment.describe(device) | roof.described()
    print(environment.header(described))
    rows = {}
    with console.progress() as say:
        for variant in variants:
            case = benchmarks("rooms").Case(of_shape, precision, device, variant, options)
            with _user_errors():
                lineup = module.lineup(case)
            tell = lambda text, variant=variant: say(f"{name} {variant}: {text}")
            for row in benchmarks("harness").measure(name, case, lineup, effort, roof, tell):
                rows[variant, row.impl] = row
                # after each row: an interruption loses the one it meets
                if json:
                    results.write_json(json, described, list(rows.values()))
                if csv:
                    results.write_csv(csv, described, list(rows.values()))
    console.print_tables(rows.values())
    return int(any(row.is_ours and not row.check.startswith("pass") for row in rows.values()))


def _device(asked: str | None) -> str:
    if asked == "cuda" and not torch.cuda.is_available():
        raise UserError("--device: torch sees no GPU here, got 'cuda'")
    return asked or ("cuda" if torch.cuda.is_available() else "cpu")


def _effort(seconds: float | None, effort: timing.Effort) -> timing.Effort:
    if seconds is None:
        return effort
    if not seconds >= 0:
        raise UserError(f"--seconds: expected a number of at least 0, got {seconds}")
    return dataclasses.replace(effort, budget_s=seconds)


@contextlib.contextmanager
def _user_errors() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from error

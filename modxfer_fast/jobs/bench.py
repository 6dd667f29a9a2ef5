"""`modxfer bench`: a sweep over the variants of a room, whose benchmarks are found in a checkout.

The roof of the machine is a stage, and so is each variant. A sweep measures: nothing is taken from
a cache. Its stages stand beside the file that it writes, where an interrupted one is taken up only
if a person asks for that, and are gone when it ends.
"""

import contextlib
import dataclasses
import importlib
import importlib.util
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch

import modxfer_fast
from modxfer_fast.errors import UserError
from modxfer_fast.files import MARKER, FileLock, LockedError, read_json, write_json
from modxfer_fast.jobs.stage import Stage, StageContext
from modxfer_fast.jobs.store import Store
from modxfer_fast.kernels import env
from modxfer_fast.measure import environment, roofline, timing

_ROOF_STAGE = "roof"
_ROOF, _ROWS = "roof.json", "rows.json"  # what stages leave


def load_benchmarks() -> Callable[[str], ModuleType]:
    """Importer of `benchmarks.<name>`.

    The package is loaded from its folder: with the repository root on sys.path, our `kernels/`
    would answer to the name of another library.

    Raises:
        UserError: neither the package nor the current folder is part of a checkout.
    """
    for root in (Path(modxfer_fast.__file__).resolve().parents[1], Path.cwd()):
        folder = root / "benchmarks"
        if "benchmarks" not in sys.modules and (folder / "harness.py").is_file():
            spec = importlib.util.spec_from_file_location(
                "benchmarks", folder / "__init__.py", submodule_search_locations=[str(folder)]
            )
            assert spec is not None  # of a file that is there
            assert spec.loader is not None
            sys.modules["benchmarks"] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules["benchmarks"])
    if "benchmarks" not in sys.modules:
        raise UserError(
            "bench: the benchmarks are not part of the installed package; "
            "run `modxfer bench` in a checkout of the repository"
        )
    return lambda name: importlib.import_module(f"benchmarks.{name}")


def load_room(name: str) -> ModuleType:
    """The module `benchmarks/bench_<name>.py`.

    Libraries are held to the instruction set of our kernels before they compute anything.

    Raises:
        UserError: there is none.
    """
    environment.hold_libraries(env.cpu_isa())
    benchmarks = load_benchmarks()
    known = benchmarks("rooms").names()
    if name not in known:
        raise UserError(f"room: expected one of {', '.join(known)}, got {name!r}")
    return benchmarks(f"bench_{name}")


def run_bench(
    name: str,
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
    resume: bool,
) -> int:
    """Measure and show every variant; files have each row as soon as it is there.

    Args:
        name: of the room.
        device, dtype, shape: None for what the machine and the room have.
        sizes: in place of the shape's, where not None.
        seconds: of timing a variant, beyond the least rounds.
        resume: keep the variants that an interrupted sweep of the same file has measured on this
            machine, with these versions and this commit.
    Returns:
        0 when our backends pass their check, 1 when one of them does not.
    Raises:
        UserError: a value that the room or this machine does not have.
    """
    benchmarks, room = load_benchmarks(), load_room(name).ROOM
    console, results = benchmarks("console"), benchmarks("results")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device: torch sees no GPU here, got 'cuda'")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with _user_errors():
        for variant in variants:
            room.check_variant(variant)
        given = {size: value for size, value in sizes.items() if value is not None}
        of_shape = dataclasses.replace(room.shape(shape or room.default_shape[device]), **given)
    effort = timing.QUICK if quick else timing.Effort()
    if seconds is not None:
        if not seconds >= 0:
            raise UserError(f"--seconds: expected a number of at least 0, got {seconds}")
        effort = dataclasses.replace(effort, budget_s=seconds)
    described = environment.describe(device)
    same = {key: value for key, value in described.items() if key != "date"}
    machine = Machine(device, dtype or ("bfloat16" if device == "cuda" else "float32"), same)

    rows: dict[tuple[str, str], Any] = {}

    def keep(variant: str, *measured: Any) -> None:
        rows.update({(variant, row.impl): row for row in measured})
        if json:
            results.write_json(json, described, list(rows.values()))
        if csv:
            results.write_csv(csv, described, list(rows.values()))

    with _sweep(json or csv, resume) as store:
        roof = Stage(_ROOF_STAGE, _measure_roof, machine, versions=())
        progress: Any  # stands for the console of a job
        with console.progress() as say:
            progress = _Progress(say)
            described |= _read_roof(store.get(roof, progress)).described()
        print(environment.header(described))
        with console.progress() as say:
            for variant in variants:
                measurement = Measurement(machine, name, variant, of_shape, options, effort)
                inputs, title = {"roof": roof}, f"{name} {variant}"
                stage = Stage(title, _measure, measurement, inputs, title=title, versions=())
                progress = _Progress(say, partial(keep, variant))
                folder = store.get(stage, progress)
                keep(variant, *results.read(folder / _ROWS)[1])
    console.print_tables(rows.values())
    return int(any(row.is_ours and not row.check.startswith("pass") for row in rows.values()))


@dataclass(frozen=True)
class Machine:
    """What the roof depends on.

    Attributes:
        described: names, versions and commit, without the date.
    """

    device: str
    dtype: str
    described: Mapping[str, str]


@dataclass(frozen=True)
class Measurement:
    """One variant of a room; `shape` is one of its own sizes."""

    machine: Machine
    room: str
    variant: str
    shape: Any
    options: Mapping[str, float]
    effort: timing.Effort


class _Progress:
    """The console of stages: a line of progress, and rows as they come."""

    def __init__(
        self, say: Callable[[str], None], keep: Callable[[Any], None] = lambda row: None
    ) -> None:
        self.say, self.keep = say, keep

    def phase(self, name: str) -> contextlib.AbstractContextManager[None]:
        self.say(name)
        return contextlib.nullcontext()


def _measure_roof(context: StageContext) -> None:
    context.console.say("roof of this machine: a copy and a matrix product")
    machine: Machine = context.options
    roof = roofline.measure_roof(machine.device, getattr(torch, machine.dtype))
    write_json(context.folder / _ROOF, dataclasses.asdict(roof))


def _read_roof(folder: Path) -> roofline.Roof:
    return roofline.Roof(**read_json(folder / _ROOF))


def _measure(context: StageContext) -> None:
    this: Measurement = context.options
    benchmarks, room, machine = load_benchmarks(), load_room(this.room), this.machine
    dtype = getattr(torch, machine.dtype)
    case = benchmarks("rooms").Case(this.shape, dtype, machine.device, this.variant, this.options)
    with _user_errors():
        lineup = room.lineup(case)
    roof, rows, progress = _read_roof(context.inputs["roof"]), {}, cast(_Progress, context.console)
    say = lambda text: progress.say(f"{this.room} {this.variant}: {text}")
    for row in benchmarks("harness").measure(this.room, case, lineup, this.effort, roof, say):
        rows[row.impl] = row
        progress.keep(row)  # an interruption loses the row that it meets
    benchmarks("results").write_json(
        context.folder / _ROWS, dict(machine.described), list(rows.values())
    )


@contextlib.contextmanager
def _sweep(file: Path | None, resume: bool) -> Iterator[Store]:
    """Where the stages of a sweep are until it ends well."""
    if file is None:
        if resume:
            raise UserError("--resume: expected the --json or --csv of the sweep to go on with")
        with tempfile.TemporaryDirectory() as folder:
            store = Store(Path(folder))
            store.hint = None
            yield store
        return
    root = file.with_name(f".{file.name}.sweep")
    root.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(root.with_name(f"{root.name}.lock"))
    try:
        lock.acquire()
    except LockedError as error:
        raise UserError(f"{file} is being written by {error}; name another file") from None
    try:
        if root.exists() and not resume:
            shutil.rmtree(root)
        store = Store(root)
        store.reused = "measured before the interruption"
        store.hint = "--resume keeps the variants that are measured"
        yield store
    except BaseException:
        if not any(marker.parts[-3] != _ROOF_STAGE for marker in root.glob(f"*/*/{MARKER}")):
            shutil.rmtree(root, ignore_errors=True)
        raise
    else:
        shutil.rmtree(root)
    finally:
        lock.release()


@contextlib.contextmanager
def _user_errors() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from error

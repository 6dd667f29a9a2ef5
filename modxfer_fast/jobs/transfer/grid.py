"""A grid of transfer jobs, cell by cell; table and pictures grow with every cell."""

import math
import time
from functools import partial
from pathlib import Path

from modxfer_fast.config import ConfigError
from modxfer_fast.config.grid import SCRATCH, Cell, Grid
from modxfer_fast.data.tasks import PRIMARY_METRIC
from modxfer_fast.errors import NonFiniteError
from modxfer_fast.files import write_text
from modxfer_fast.jobs.job import quieten_libraries
from modxfer_fast.jobs.ranks import single_process
from modxfer_fast.jobs.store import Store
from modxfer_fast.jobs.threads import settle_threads
from modxfer_fast.jobs.transfer.job import TransferJob
from modxfer_fast.report import METRIC_NAMES, JobConsole
from modxfer_fast.report import transfer_table as table
from modxfer_fast.report.transfer_plots import plot_learning, plot_scores

_REDRAW_SECONDS = 60  # pictures of hundreds of cells take seconds, and cached cells none


def run_grid(grid: Grid) -> list[table.CellResult]:
    """Run every cell; cells whose stages are in the cache take no time.

    The folder of the table holds `results.csv` and `curves.csv`, rewritten after each cell, and
    `table.md` and pictures, rewritten at the end and whenever a repeat of a group is complete, but
    no more than once a minute. `checkpoints.csv` and `steps.md` are there with `total_steps`.

    Raises:
        UserError: of the first cell that cannot work; what was done before stays. A cell whose
            training diverges is left out of the table, and said so.
    """
    single_process(TransferJob.command)
    quieten_libraries()
    output = Path(grid.output_dir).expanduser().absolute()
    _check_table(output, grid)
    console = JobConsole(is_main=True)
    store = Store()
    for cell in grid.cells:  # every mistake before the first hour
        TransferJob(cell.job, JobConsole(is_main=False), store).check()
    output.mkdir(parents=True, exist_ok=True)
    kinds = dict.fromkeys(PRIMARY_METRIC[cell.job.task.kind] for cell in grid.cells)
    metric = " or ".join(METRIC_NAMES[kind] for kind in kinds)
    results: list[table.CellResult] = []
    settle_threads(console.say)
    drawn = -math.inf
    with console.progress(len(grid.cells)) as progress:
        for number, cell in enumerate(grid.cells, 1):
            start = time.perf_counter()
            name = f"{number}/{len(grid.cells)}  {' '.join(cell.labels.values())}"
            job = TransferJob(cell.job, JobConsole(is_main=False), store)
            try:
                student = job.graph.scratch if cell.job.transfer is None else job.graph.student
                result = job.cell(student, cell.labels)
            except NonFiniteError as error:
                console.say(f"{name}: left out, {error}")
            else:
                results.append(result)
                table.write_results(results, output)
                console.say(
                    f"{name}: {result.score:.3f} from {result.initial:.3f}, "
                    f"teacher {result.teacher:.3f}  ({time.perf_counter() - start:.0f} s)"
                )
            progress(number, len(grid.cells))
            is_last = number == len(grid.cells)
            if results and (is_last or _is_due(cell, grid.cells[number], drawn)):
                _write_tables(results, grid, metric, output)
                drawn = time.perf_counter()
    console.say(f"table, CSV and pictures in {output}")
    return results


def _check_table(output: Path, grid: Grid) -> None:
    """Raise a ConfigError where the folder of the table has something that would be lost."""
    if not output.exists() or not any(output.iterdir()):
        return
    if not (output / table.RESULTS).is_file():
        raise ConfigError(
            f"output_dir: {output} exists and holds no {table.RESULTS}; name another folder"
        )
    cells = [cell.labels for cell in grid.cells]
    others = [row.labels for row in table.read_results(output) if row.labels not in cells]
    if others:
        raise ConfigError(
            f"output_dir: {output} has results of {len(others)} other cells, e.g. "
            f"{' '.join(others[0].values())}; name another folder, or let grid.only allow them, "
            "too: cells that are done take no time"
        )


def _is_due(cell: Cell, following: Cell, drawn: float) -> bool:
    """Whether a group ends with this cell, and its tables are older than they may be."""
    return _group(cell) != _group(following) and time.perf_counter() - drawn > _REDRAW_SECONDS


def _group(cell: Cell) -> tuple[str, ...]:
    return tuple(label for axis, label in cell.labels.items() if axis != "method")


def _write_tables(results: list[table.CellResult], grid: Grid, metric: str, output: Path) -> None:
    grouped = partial(
        table.group_results, scratch=SCRATCH, repeats=grid.repeats, choose=grid.choose
    )
    groups = grouped(results)
    if steps := table.steps_of(results):
        by_step = {step: grouped(table.after_step(results, step)) for step in steps}
        write_text(output / "steps.md", table.markdown_by_steps(by_step))
    write_text(output / "table.md", table.markdown(groups, SCRATCH))
    plot_scores(groups, SCRATCH, metric, output / "scores.png")
    plot_learning(groups, SCRATCH, metric, output / "learning.png")

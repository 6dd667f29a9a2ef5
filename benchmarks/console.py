"""What a measurement shows: where it is, and its rows as tables. Plain where rich is absent."""

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator

from benchmarks.results import Row

_TABLE_WIDTH = 160


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """A line that changes in place on a terminal, one line per stage elsewhere."""
    if not sys.stderr.isatty():
        yield lambda text: print(text, file=sys.stderr, flush=True)
        return
    try:
        from rich.console import Console
    except ImportError:
        yield lambda text: print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)
        return
    with Console(stderr=True).status("") as status:
        yield status.update


def print_tables(rows: Iterable[Row]) -> None:
    """One table a problem."""
    problems: dict[tuple, list[Row]] = {}
    for row in rows:
        problems.setdefault(tuple(row.problem.items()), []).append(row)
    for problem, group in problems.items():
        first = group[0]
        digits = 1 if first.device == "cpu" else 3
        launches_of = next((row.launches_of for row in group if row.launches_of), "launches")
        columns = {
            "time ms": ("time_ms", digits),
            "± iqr": ("time_ms_iqr", digits),
            "of floor": ("ratio_to_floor", 3),
            "roof ms": ("predicted_ms", digits),
            "peak MiB": ("peak_mib", 1),
            "saved MiB": ("saved_mib", 1),
            launches_of: ("launches", 0),
        }
        for name in ("host_ms", "graph_ms"):  # of a GPU
            if any(getattr(row, name) is not None for row in group):
                columns[name.replace("_", " ")] = (name, 3)
        cells = [
            (row.impl, row.check, *(_number(getattr(row, name), n) for name, n in columns.values()))
            for row in group
        ]
        described = ", ".join(f"{name}={value}" for name, value in problem)
        title = f"{first.room} on {first.device}, {first.dtype}, {described}"
        _print_table(title, ("implementation", "check", *columns), cells)


def _print_table(title: str, head: tuple[str, ...], cells: list[tuple[str, ...]]) -> None:
    try:
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
        print(f"\n{title}")
        for row in (head, *cells):
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))
        return
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for index, name in enumerate(head):
        table.add_column(name, justify="left" if index < 2 else "right")
    for row in cells:
        table.add_row(*row)
    # a log file has no width of its own, and wrapped cells are hard to read there
    width = None if sys.stdout.isatty() else _TABLE_WIDTH
    Console(width=width, highlight=False).print(table)


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"

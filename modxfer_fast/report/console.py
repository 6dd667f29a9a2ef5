"""What the person sees: phases, progress of training, and the closing table."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table


class JobConsole:
    """Prints on the main process of a job and stays silent on the others.

    phase_seconds: wall time of every finished phase by name, without the phases inside it.
    """

    def __init__(self, *, is_main: bool) -> None:
        self._console = Console(quiet=not is_main, highlight=False)
        self.phase_seconds: dict[str, float] = {}
        self._inside = 0.0  # seconds of the phases inside the one at hand

    def say(self, message: str) -> None:
        """One indented line about the current phase."""
        self._console.print(f"  {escape(message)}")

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Announce a phase and say how long it took."""
        self._console.print(f"[bold]{name}[/bold]")
        start = time.perf_counter()
        outer, self._inside = self._inside, 0.0
        try:
            yield
            seconds = time.perf_counter() - start
            own = seconds - self._inside
            outer += seconds
        finally:
            self._inside = outer
        self.phase_seconds[name] = self.phase_seconds.get(name, 0.0) + own
        self._console.print(f"  [dim]{seconds:.1f} s[/dim]")

    def training(self, total_steps: int) -> "TrainingDisplay":
        """A display for one training run: a live bar on a terminal, else a line per log entry."""
        return TrainingDisplay(self._console, total_steps)

    @contextmanager
    def progress(self, total: int | None) -> Iterator[Callable[[int, int], None]]:
        """A bar that `f(done, total)` moves, on a terminal; `total` None until the first call."""
        bar = Progress(
            TextColumn(" "),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal or self._console.quiet,
        )
        with bar:
            task = bar.add_task("work", total=total)
            yield lambda done, total: bar.update(task, completed=done, total=total)

    def table(self, title: str, columns: list[str], rows: list[list[str]]) -> None:
        """A table whose first column is text and whose others are numbers."""
        self._console.print(f"[bold]{title}[/bold]")
        table = Table()
        for index, column in enumerate(columns):
            table.add_column(column, justify="right" if index else "left", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        self._console.print(table)


class TrainingDisplay:
    """Progress of one training run."""

    def __init__(self, console: Console, total_steps: int) -> None:
        self._console = console
        self._total = total_steps
        self._bar = Progress(
            TextColumn(" "),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=console,
            disable=not console.is_terminal or console.quiet,
        )
        self._task = self._bar.add_task("train", total=total_steps, numbers="")
        self._bar.start()

    def step(self, step: int) -> None:
        """`step` optimiser steps are done."""
        self._bar.update(self._task, completed=step)

    def numbers(self, step: int, numbers: dict[str, float], *, keep: bool) -> None:
        """Show the latest logged numbers; `keep` gives them a line of their own beside the bar."""
        text = "  ".join(f"{name} {_short(value)}" for name, value in numbers.items())
        if keep or self._bar.disable:
            self._console.print(f"  step {step}/{self._total}  {text}")
        else:
            self._bar.update(self._task, numbers=text)

    def close(self) -> None:
        """Stop drawing."""
        self._bar.stop()


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"

"""What the person sees: phases, progress, and the closing tables."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TimeRemainingColumn
from rich.table import Table
from transformers import TrainerCallback

_SHOWN = {
    "loss": "loss",
    "kd_loss": "kd",
    "ce_loss": "ce",
    "hidden_loss": "hidden",
    "relation_loss": "relation",
    "eval_perplexity": "held-out perplexity",
    "eval_kd": "held-out KL",
    "eval_hidden_loss": "held-out hidden",
    "eval_hidden_cosine": "held-out cosine",
    "eval_relation_loss": "held-out relation",
    "eval_f1": "validation F1",
    "eval_accuracy": "validation accuracy",
    "on_policy_share": "on-policy",
    "completion_length": "completion tokens",
    "skipped_steps": "skipped steps",
    "tokens_per_s": "tokens/s",
    "peak_mem_mib": "peak MiB",
}


class JobConsole:
    """Prints on the main process of a job and stays silent on the others.

    phase_seconds: wall time of every finished phase by name, without the phases inside it.
    """

    def __init__(self, *, is_main: bool) -> None:
        # names of sources and texts of models are printed too: [b] is no markup in them
        self._console = Console(quiet=not is_main, highlight=False, markup=False, emoji=False)
        self.phase_seconds: dict[str, float] = {}
        self._inside = 0.0  # seconds of the phases inside the one at hand

    def say(self, message: str) -> None:
        """Indented lines about the current phase."""
        for line in message.splitlines():
            self._console.print(f"  {line}", soft_wrap=True)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Announce a phase and say how long it took."""
        self._console.print(name, style="bold")
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
        self._console.print(f"  {seconds:.1f} s", style="dim")

    def bar(self, *columns: str, transient: bool = False) -> Progress:
        """Of work done and to do, with further columns; only a terminal shows it."""
        return Progress(
            " ",
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            *columns,
            console=self._console,
            transient=transient,
            disable=not self._console.is_terminal or self._console.quiet,
        )

    @contextmanager
    def progress(self, total: int | None) -> Iterator[Callable[[int, int], None]]:
        """A bar that `f(done, total)` moves, on a terminal; `total` None until the first call."""
        with self.bar(transient=True) as bar:
            task = bar.add_task("work", total=total)
            yield lambda done, total: bar.update(task, completed=done, total=total)

    def table(
        self, title: str, columns: Sequence[tuple[str, str]], rows: Iterable[Sequence[Any]]
    ) -> None:
        """A table whose first column is text and whose others are numbers.

        Args:
            columns: heading, and format of the values, which may also be text, or None for nothing.
        """
        self._console.print(title, style="bold")
        table = Table()
        for index, (heading, _) in enumerate(columns):
            table.add_column(heading, justify="right" if index else "left", no_wrap=True)
        for row in rows:
            table.add_row(
                *(_cell(value, fmt) for value, (_, fmt) in zip(row, columns, strict=True))
            )
        self._console.print(table)


def _cell(value: Any, fmt: str) -> str:
    return value if isinstance(value, str) else "" if value is None else format(value, fmt)


class ConsoleCallback(TrainerCallback):
    """Draws a training run on a `JobConsole`: a live bar on a terminal, else a line per log entry.

    Evaluations have lines of their own beside the bar.
    """

    _bar: Progress
    _task: TaskID | None = None  # None unless a run is at hand

    def __init__(self, console: JobConsole) -> None:
        self._console = console

    def on_train_begin(self, args, state, control, **kwargs):
        self._bar = self._console.bar("{task.fields[numbers]}")
        done, total = state.global_step, state.max_steps
        self._task = self._bar.add_task("train", completed=done, total=total, numbers="")
        self._bar.start()

    def on_step_end(self, args, state, control, **kwargs):
        self._bar.update(self._task, completed=state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        numbers = [f"{name} {_short(logs[key])}" for key, name in _SHOWN.items() if key in logs]
        if self._task is None or not numbers:
            return
        text = "  ".join(numbers)
        if self._bar.disable or any(key.startswith("eval_") for key in logs):
            self._console.say(f"step {state.global_step}/{state.max_steps}  {text}")
        else:
            self._bar.update(self._task, numbers=text)

    def on_samples(self, step: int, samples: Sequence[Any]) -> None:
        """Draws what student and teacher wrote; only the first words of each."""
        columns = [(name, "") for name in ("prompt", "student", "teacher")]
        rows = [[_words(s.prompt, end=True), _words(s.student), _words(s.teacher)] for s in samples]
        self._console.table(f"What the models write at step {step}", columns, rows)

    def on_train_end(self, args, state, control, **kwargs):
        self._bar.stop()
        self._task = None


def _words(text: str | None, *, end: bool = False, width: int = 36) -> str:
    """The first characters of a text, or the last, on one line."""
    line = " ".join((text or "").split())
    if len(line) <= width:
        return line
    return f"…{line[1 - width :]}" if end else f"{line[: width - 1]}…"


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"

"""Many transfer jobs in one file: a base job, axes along which cells differ, and their order."""

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from modxfer_fast.config.errors import ConfigError
from modxfer_fast.config.loading import apply_override, load_raw, validate
from modxfer_fast.config.section import Section
from modxfer_fast.config.transfer import TransferConfig

SCRATCH = "scratch"  # label of the method that every other one is compared with


def _written_out(value: Any) -> Any:
    """`{path: ..., values: [...]}` as one override per value."""
    if not isinstance(value, dict):
        return value
    return {
        axis: {str(v): {choices["path"]: v} for v in choices["values"]}
        if isinstance(choices, dict)
        and set(choices) == {"path", "values"}
        and isinstance(choices["values"], list)
        else choices
        for axis, choices in value.items()
    }


Axes = Annotated[
    dict[str, Annotated[dict[str, dict[str, Any]], Field(min_length=1)]],
    BeforeValidator(_written_out),
]


class GridSection(Section):
    """Many jobs that differ along axes; their results become one table.

    Strings of the job may name an axis in braces, as `students/{pair}`: its label takes the place.

    axes: {axis: {label: {dotted.key: value, ...}}}, or {axis: {path: dotted.key, values: [...]}}.
        A section that a label sets to null stays off, whatever other axes set in it.
        `method` and `seed` must be among them, and the method `scratch`.
    only: cells to run, as {axis: [labels]}; a cell runs if one entry allows it. Null runs all.
    slowest: axes that vary slowest, first to last; the others follow as they stand in `axes`, the
        last one fastest.
    repeats: axes along which the same is done again, e.g. of seeds, models or both: the table has
        means over them, and compares a method with scratch at equal labels.
    choose: an axis, e.g. of learning rates, of which the table has for every method the label with
        the best mean validation score after the steps in question.
    """

    axes: Axes
    only: list[dict[str, list[str]]] | None = None
    slowest: list[str] = ["seed"]
    repeats: Annotated[list[str], Field(min_length=1)] = ["seed"]
    choose: str | None = None

    @model_validator(mode="after")
    def _consistent(self):
        for axis in ("method", "seed"):
            if axis not in self.axes:
                raise ValueError(f"axes: expected {axis} among them, got {', '.join(self.axes)}")
        if SCRATCH not in self.axes["method"]:
            raise ValueError(
                f"axes.method: expected {SCRATCH} among them, which the others are compared with, "
                f"got {', '.join(self.axes['method'])}"
            )
        for where in ("slowest", "repeats"):
            for axis in getattr(self, where):
                self._check_axis(where, axis)
        if self.choose is not None:
            self._check_axis("choose", self.choose)
            if self.choose in (*self.repeats, "method"):
                raise ValueError(
                    f"choose: expected an axis besides method and repeats, got {self.choose}"
                )
        for allowed in self.only or ():
            for axis, labels in allowed.items():
                self._check_axis("only", axis)
                unknown = [label for label in labels if label not in self.axes[axis]]
                if unknown:
                    raise ValueError(
                        f"only.{axis}: expected labels among {', '.join(self.axes[axis])}, "
                        f"got {', '.join(unknown)}"
                    )
        return self

    def _check_axis(self, where: str, axis: str) -> None:
        if axis not in self.axes:
            raise ValueError(f"{where}: expected axes among {', '.join(self.axes)}, got {axis}")

    def cells(self) -> list[dict[str, str]]:
        """Labels by axis, in the order in which cells run."""
        order = [*self.slowest, *(axis for axis in self.axes if axis not in self.slowest)]
        choices = itertools.product(*(self.axes[axis] for axis in order))
        cells = [dict(zip(order, labels, strict=True)) for labels in choices]
        return [
            {axis: cell[axis] for axis in self.axes} for cell in cells if self._is_allowed(cell)
        ]

    def _is_allowed(self, cell: dict[str, str]) -> bool:
        return self.only is None or any(
            all(cell[axis] in labels for axis, labels in allowed.items()) for allowed in self.only
        )


@dataclass(frozen=True)
class Cell:
    """One job of a grid, by its label on every axis."""

    labels: dict[str, str]
    job: TransferConfig


@dataclass(frozen=True)
class Grid:
    """The cells in the order in which they run, and the folder of their table.

    repeats, choose: as `GridSection` has them.
    """

    output_dir: str
    axes: tuple[str, ...]
    cells: tuple[Cell, ...]
    repeats: tuple[str, ...] = ("seed",)
    choose: str | None = None


def load_transfer(path: str | Path, overrides: Sequence[str] = ()) -> TransferConfig | Grid:
    """Read a transfer job, or with a `grid` section all its cells.

    Arguments and errors as of `load_config`; overrides change the base of every cell.
    """
    raw = load_raw(path, overrides)
    section = raw.pop("grid", None)
    if section is None:
        return validate(raw, TransferConfig, str(path))
    grid = validate({"grid": section}, _GridFile, str(path)).grid
    cells = []
    for labels in grid.cells():
        name = " ".join(f"{axis}={label}" for axis, label in labels.items())
        job = copy.deepcopy(raw)
        chosen = [
            (axis, label, dotted, value)
            for axis, label in labels.items()
            for dotted, value in grid.axes[axis][label].items()
        ]
        # what one axis switches off, e.g. `transfer: null`, no other axis brings back
        off = tuple(f"{dotted}." for _, _, dotted, value in chosen if value is None)
        for axis, label, dotted, value in chosen:
            if not (off and dotted.startswith(off)):
                where = f"{path}: grid.axes.{axis}.{label}.{dotted}"
                apply_override(job, dotted, copy.deepcopy(value), where)
        job = _labelled(job, labels)
        job.setdefault("scratch", False)  # a cell of its own
        cells.append(Cell(labels, validate(job, TransferConfig, f"{path} [{name}]")))
    if not cells:
        raise ConfigError(f"{path}: grid.only: expected at least one cell, got none")
    return Grid(
        cells[0].job.output_dir, tuple(grid.axes), tuple(cells), tuple(grid.repeats), grid.choose
    )


def _labelled(value: Any, labels: dict[str, str]) -> Any:
    """With `{axis}` in every string replaced by the label on that axis."""
    if isinstance(value, dict):
        return {key: _labelled(item, labels) for key, item in value.items()}
    if isinstance(value, list):
        return [_labelled(item, labels) for item in value]
    if isinstance(value, str):
        for axis, label in labels.items():
            value = value.replace(f"{{{axis}}}", label)
    return value


class _GridFile(Section):
    grid: GridSection

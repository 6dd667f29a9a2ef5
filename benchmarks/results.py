"""Rows of a benchmark, and the two files they are kept in."""

import contextlib
import csv
import dataclasses
import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from modxfer_fast import files


@dataclasses.dataclass(frozen=True)
class Row:
    """One implementation on one problem; what was measured is null where the check did not pass.

    Attributes:
        problem: sizes, variant and options of the room, by name. In a file each is a column of its
            own, between `dtype` and `check`.
        check: "pass" or "over" with the worst relative error against fp64 and its budget, "fail"
            with what went wrong, "floor", "not installed", or why the implementation does not run
            here. One that is over its budget is timed, and marked wherever it is shown.
        time_ms, time_ms_iqr: median and interquartile range over rounds, forward and backward.
        floor_ms: median of the floor this row is compared with, in the same rounds.
        ratio_to_floor: time_ms / floor_ms.
        peak_mib: memory above inputs and gradients.
        floor: name of that floor.
        flops, bytes: what the formula cannot do without (roofline.Work); of a floor, what it does.
        predicted_ms: the time that the roof of this machine, measured in the same run, allows them,
            or the kernels of the implementation one after another where the room counts those.
        saved_mib: kept from forward to backward, weights left out.
        launches: of what `launches_of` says, in one forward and backward.
        host_ms: Python's time for one forward and backward, on a GPU, where it runs beside time_ms.
        graph_ms: median of replays of a CUDA graph of it, in the rooms that ask for one.
    """

    room: str
    impl: str
    device: str
    dtype: str
    problem: Mapping[str, int | float | str]
    check: str
    time_ms: float | None = None
    time_ms_iqr: float | None = None
    floor_ms: float | None = None
    ratio_to_floor: float | None = None
    peak_mib: float | None = None
    floor: str | None = None
    flops: int | None = None
    bytes: int | None = None
    predicted_ms: float | None = None
    saved_mib: float | None = None
    launches: int | None = None
    launches_of: str | None = None
    host_ms: float | None = None
    graph_ms: float | None = None

    @property
    def is_ours(self) -> bool:
        return self.impl.startswith("ours")

    @property
    def is_over_budget(self) -> bool:
        return self.check.startswith("over")


_FIELDS = {field.name: field.type for field in dataclasses.fields(Row) if field.name != "problem"}
_BEFORE_PROBLEM = ("room", "impl", "device", "dtype")


def write_json(path: Path, environment: dict[str, str], rows: list[Row]) -> None:
    """{"environment": {...}, "rows": [{column: value}]}."""
    content = {"environment": environment, "rows": [_record(row) for row in rows]}
    _write(path, json.dumps(content, indent=2) + "\n")


def write_csv(path: Path, environment: dict[str, str], rows: list[Row]) -> None:
    """A comment line with the environment as JSON, the columns, the rows; null is an empty cell."""
    text = io.StringIO()
    text.write(f"# {json.dumps(environment)}\n")
    writer = csv.DictWriter(text, columns(rows), lineterminator="\n")
    writer.writeheader()
    writer.writerows(_record(row) for row in rows)
    _write(path, text.getvalue())


def _write(path: Path, text: str) -> None:
    # whole files only: a run that writes row after row may be cut at any time
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path, text)


def read(path: Path) -> tuple[dict[str, str], list[Row]]:
    """Environment and rows of a file that `write_json` or `write_csv` made, now or earlier."""
    if path.suffix == ".json":
        content = json.loads(path.read_text())
        return content["environment"], [_row(record) for record in content["rows"]]
    with path.open(newline="") as file:
        environment = json.loads(file.readline().removeprefix("# "))
        records = csv.DictReader(file)
        rows = [_row({name: _cell(name, text) for name, text in r.items()}) for r in records]
    return environment, rows


def columns(rows: Iterable[Row]) -> tuple[str, ...]:
    """Columns of a file with these rows, which may be of different problems."""
    problem = dict.fromkeys(name for row in rows for name in row.problem)
    return tuple(dict.fromkeys((*_BEFORE_PROBLEM, *problem, *_FIELDS)))


def _record(row: Row) -> dict[str, Any]:
    values = dataclasses.asdict(row)
    values |= values.pop("problem")
    return {name: values[name] for name in columns([row])}


def _row(record: dict[str, Any]) -> Row:
    fields = {name: record.pop(name) for name in _FIELDS if name in record}
    # one is null that is a size of another room
    return Row(problem={n: v for n, v in record.items() if v is not None}, **fields)


def _cell(column: str, text: str) -> int | float | str | None:
    """Of a CSV file, as its column's type; a number is told by what it looks like."""
    kind = _FIELDS.get(column)
    if text == "" and kind is not str:
        return None
    for number in () if kind in (str, str | None) else (int, float):
        with contextlib.suppress(ValueError):
            return number(text)
    return text

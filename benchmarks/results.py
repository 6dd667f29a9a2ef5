"""Rows of a benchmark, and the two files they are kept in."""

import csv
import dataclasses
import json
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Row:
    """One implementation on one problem; times are null where the check did not pass.

    Attributes:
        D_s, D_t: null in rooms that start from logits.
        check: "pass" or "fail" with the worst relative error against fp64 and its budget, "floor",
            "not installed", or why the implementation does not run here.
        time_ms, time_ms_iqr: median and interquartile range over rounds, forward and backward.
        floor_ms: median of the floor this row is compared with, in the same rounds.
        ratio_to_floor: time_ms / floor_ms.
        peak_mib: memory above inputs and gradients.
    """

    room: str
    impl: str
    device: str
    dtype: str
    N: int
    D_s: int | None
    D_t: int | None
    V: int
    divergence: str
    check: str
    time_ms: float | None = None
    time_ms_iqr: float | None = None
    floor_ms: float | None = None
    ratio_to_floor: float | None = None
    peak_mib: float | None = None


COLUMNS = tuple(field.name for field in dataclasses.fields(Row))


def write_json(path: Path, environment: dict[str, str], rows: list[Row]) -> None:
    """{"environment": {...}, "rows": [{column: value}]}."""
    content = {"environment": environment, "rows": [dataclasses.asdict(row) for row in rows]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")


def write_csv(path: Path, environment: dict[str, str], rows: list[Row]) -> None:
    """A comment line with the environment as JSON, the columns, the rows; null is an empty cell."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        file.write(f"# {json.dumps(environment)}\n")
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(dataclasses.asdict(row) for row in rows)


def read(path: Path) -> tuple[dict[str, str], list[Row]]:
    """Environment and rows of a file that `write_json` or `write_csv` made."""
    if path.suffix == ".json":
        content = json.loads(path.read_text())
        return content["environment"], [Row(**row) for row in content["rows"]]
    with path.open(newline="") as file:
        environment = json.loads(file.readline().removeprefix("# "))
        rows = [Row(**_typed(record)) for record in csv.DictReader(file)]
    return environment, rows


def _typed(record: dict[str, str]) -> dict[str, Any]:
    kinds = {field.name: field.type for field in dataclasses.fields(Row)}
    typed = {}
    for column, text in record.items():
        kind = kinds[column]
        if text == "" and kind not in (str, int):
            typed[column] = None
        else:
            typed[column] = text if kind is str else (float if kind == float | None else int)(text)
    return typed

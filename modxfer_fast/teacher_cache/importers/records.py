"""Records of a data set in any of the files that these come in, one at a time."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modxfer_fast.data.sources import is_saved_dataset
from modxfer_fast.teacher_cache.importers.entries import ImportRefused

_ENDINGS = (".jsonl", ".json", ".parquet")


def records_of(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Records of a .jsonl or .parquet file, of a folder of them or of a saved data set.

    Yields:
        A place for messages, and the columns.

    Raises:
        ImportRefused: nothing of that kind there, a damaged file, or a record without a column.
    """
    for place, record in _records(path):
        if missing := [name for name in columns if record.get(name) is None]:
            raise ImportRefused(
                f"{place}: expected columns {', '.join(columns)}, got {', '.join(record)}; "
                f"{', '.join(missing)} is missing"
            )
        yield place, {name: record[name] for name in columns}


def tensor_of(place: str, name: str, rows: list, dtype: torch.dtype) -> Tensor:
    """A column of a record; ImportRefused where it is not of that dtype, or not rectangular."""
    try:
        return torch.tensor(rows, dtype=dtype)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ImportRefused(
            f"{place}: {name}: expected as many {str(dtype).removeprefix('torch.')} for each "
            f"token ({error})"
        ) from error


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if path.is_dir() and is_saved_dataset(path):
        from datasets import load_from_disk

        for number, record in enumerate(load_from_disk(str(path))):
            yield f"{path}, record {number}", record
        return
    found = sorted(each for each in path.rglob("*") if each.suffix in _ENDINGS)
    files = [path] if path.is_file() else found
    if not files or files[0].suffix not in _ENDINGS:
        raise ImportRefused(
            f"{path}: expected a {' or '.join(_ENDINGS)} file, a folder of them or a saved data set"
        )
    for file in files:
        number = 0
        try:
            for record in _parquet(file) if file.suffix == ".parquet" else _lines(file):
                yield f"{file}, record {number}", record
                number += 1
        except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ImportRefused(f"{file}, record {number}: cannot be read ({error})") from error
        except _arrow_error() as error:
            raise ImportRefused(f"{file}: cannot be read ({error})") from error


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            if line.strip():
                record = json.loads(line)
                yield record if isinstance(record, dict) else {}


def _parquet(file: Path) -> Iterator[dict[str, Any]]:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(file) as table:
        for batch in table.iter_batches(batch_size=16):
            yield from batch.to_pylist()


def _arrow_error() -> type[Exception]:
    from pyarrow import ArrowException

    return ArrowException

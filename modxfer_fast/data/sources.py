"""Named sources -> `datasets.Dataset` with one of three sets of columns; see records.py."""

import glob
import json
from collections.abc import Mapping
from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

from modxfer_fast.data.facts import FACTS
from modxfer_fast.data.python_docs import python_docs
from modxfer_fast.errors import DataError

COLUMNS = {
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}
READ = {*(column for needed in COLUMNS.values() for column in needed), "tools", *FACTS}
_READERS = {
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
    ".md": "text",
}


def files_of(source: str) -> list[str]:
    """The files that a pattern stands for, by name; any other source as it is.

    Raises:
        DataError: a pattern that no file has.
    """
    path = Path(source).expanduser()
    if not glob.has_magic(source) or path.exists():
        return [source]
    found = sorted(p for p in glob.glob(str(path), recursive=True) if Path(p).is_file())
    if not found:
        raise DataError(f"data source {source}: expected files of this pattern, found none")
    return found


def load_source(
    source: str, *, name: str | None = None, split: str = "train", lines: bool = False
) -> Dataset:
    """Load `python-docs`, a file, a folder or a hub id; a DataError says why that cannot be.

    With `lines` each line of a text file is a row, empty ones left out; else the file is one.
    """
    if lines and _READERS.get(Path(source).suffix) != "text":
        raise DataError(f"data source {source}: lines: true is for a .txt or .md file")
    if source == "python-docs":
        return Dataset.from_dict({"text": python_docs()})
    path = Path(source).expanduser()
    try:
        if path.is_file():
            return _load_file(path, source, lines)
        if path.is_dir():
            return _load_folder(path, name, split)
        if path.suffix in _READERS or source.startswith((".", "/", "~")):
            raise DataError(f"data source {source}: no such file or folder")
        return load_dataset(source, name, split=split)
    except DataError:
        raise
    except Exception as error:
        # `datasets` raises several unrelated types here; all of them are about what was named
        reason = f"{error}" if error.__cause__ is None else f"{error}: {error.__cause__}"
        raise DataError(f"data source {source}: cannot be loaded ({reason})") from error


def _load_file(path: Path, source: str, lines: bool) -> Dataset:
    reader = _READERS.get(path.suffix)
    if reader is None:
        raise DataError(
            f"data source {source}: expected a file ending in {', '.join(_READERS)}, "
            f"got {path.suffix or 'no ending'}"
        )
    if path.stat().st_size == 0:
        raise DataError(f"data source {source}: expected rows, got an empty file")
    options = {"sample_by": "line" if lines else "document"} if reader == "text" else {}
    try:
        dataset = load_dataset(reader, data_files=str(path), split="train", **options)
    except Exception:
        if reader == "json":
            _check_json(path, source)
        raise
    if lines:
        dataset = dataset.filter(lambda row: bool(row["text"].strip()))
        if not len(dataset):
            raise DataError(f"data source {source}: expected lines of text, found none")
    return dataset


def _check_json(path: Path, source: str) -> None:
    """Raise a DataError with the line where a JSON file is none, if there is one."""
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        json.loads(text)
        return
    except json.JSONDecodeError as error:
        if text.lstrip().startswith("["):
            raise DataError(f"data source {source}, line {error.lineno}: {error.msg}") from None
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            json.loads(line or "null")
        except json.JSONDecodeError as error:
            raise DataError(
                f"data source {source}, line {number}: expected a JSON object, got "
                f"{line[:60]!r} ({error.msg})"
            ) from None


def _load_folder(path: Path, name: str | None, split: str) -> Dataset:
    if not is_saved_dataset(path):
        return load_dataset(str(path), name, split=split)
    dataset = load_from_disk(str(path))
    if not isinstance(dataset, DatasetDict):
        return dataset
    if split not in dataset:
        raise DataError(f"data source {path}: expected a split {split!r}, got {', '.join(dataset)}")
    return dataset[split]


def is_saved_dataset(folder: Path) -> bool:
    """Whether `datasets` saved a folder, with one split or several."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def with_columns(dataset: Dataset, columns: Mapping[str, str], source: str) -> Dataset:
    """The dataset with its columns under our names.

    Args:
        columns: {our name: name in the dataset}. ShareGPT's `conversations` need no entry.

    Raises:
        DataError: a column that is not there, or a name that is taken.
    """
    names = dataset.column_names
    renames = dict(columns)
    if "conversations" in names and "messages" not in (*names, *renames):
        renames["messages"] = "conversations"
    for ours, theirs in renames.items():
        if theirs not in names:
            raise DataError(
                f"data.columns.{ours}: expected a column of {source} ({', '.join(names)}), "
                f"got {theirs}"
            )
        if ours in names and ours not in renames.values():
            dataset = dataset.remove_columns(ours)
    return dataset.rename_columns({t: o for o, t in renames.items() if o != t})


def detect_format(dataset: Dataset, wanted: str, source: str) -> str:
    """The format `wanted`, or with `auto` the first whose columns are there; DataError if none."""
    columns = set(dataset.column_names)
    candidates = COLUMNS if wanted == "auto" else {wanted: COLUMNS[wanted]}
    for name, needed in candidates.items():
        if columns.issuperset(needed):
            return name
    expected = " or ".join(" + ".join(needed) for needed in candidates.values())
    raise DataError(
        f"data source {source}: expected columns {expected}, got {', '.join(sorted(columns))}"
    )

"""Named sources -> `datasets.Dataset` with one of three sets of columns; see records.py."""

import contextlib
import glob
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from datasets import Dataset, DatasetDict, IterableDataset, load_dataset, load_from_disk
from fsspec.compression import available_compressions

from modxfer_fast.config import SourceSection
from modxfer_fast.data.facts import FACTS, TEACHER_PROMPT
from modxfer_fast.data.python_docs import python_docs
from modxfer_fast.errors import DataError, not_loaded

COLUMNS = {
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}
READ = {
    *(column for needed in COLUMNS.values() for column in needed),
    "tools",
    TEACHER_PROMPT,
    *FACTS,
}
_READERS = {
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
    ".md": "text",
}
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")  # behind the others, but that of Parquet


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
    _check_lines(source, lines)
    if source == "python-docs":
        return Dataset.from_dict({"text": python_docs()})
    path = Path(source).expanduser()
    with naming(source):
        if path.is_file():
            return _load_file(path, source, lines)
        if path.is_dir():
            return _load_folder(path, name, split)
        _refuse_path(source)
        return load_dataset(source, name, split=split)


def stream_source(
    source: str, *, name: str | None = None, split: str = "train", lines: bool = False
) -> IterableDataset:
    """As `load_source`, also of a pattern of files of one kind, without reading it."""
    _check_lines(source, lines)
    if source == "python-docs":
        raise DataError("data.streaming: expected files, a folder or a hub id, got python-docs")
    path = Path(source).expanduser()
    with naming(source):
        if path.is_dir():
            if is_saved_dataset(path):
                return _load_folder(path, name, split).to_iterable_dataset()
            return load_dataset(str(path), name, split=split, streaming=True)
        files = [str(Path(file).expanduser()) for file in files_of(source)]
        readers = {_reader_of(file, source) for file in files if Path(file).is_file()}
        if not readers:
            _refuse_path(source)
            return load_dataset(source, name, split=split, streaming=True)
        if len(readers) > 1:
            raise DataError(
                f"data source {source}: expected files of one kind with data.streaming, got "
                f"{', '.join(sorted(readers))}"
            )
        [reader] = readers
        options = {"sample_by": "line" if lines else "document"} if reader == "text" else {}
        names = [glob.escape(file) for file in files]  # which to `datasets` are patterns
        dataset = load_dataset(reader, data_files=names, split="train", streaming=True, **options)
        return dataset.filter(_has_text) if lines else dataset


def _has_text(row: dict) -> bool:
    return bool(row["text"].strip())


def _check_lines(source: str, lines: bool) -> None:
    if lines and _READERS.get(_ending_of(source)) != "text":
        raise DataError(f"data source {source}: lines: true is for a .txt or .md file")


def _refuse_path(source: str) -> None:
    """Raises a DataError of what is no id of the hub, where no file or folder has that name."""
    if _ending_of(source) in _READERS or source.startswith((".", "/", "~")):
        raise DataError(f"data source {source}: no such file or folder")


@contextlib.contextmanager
def naming(source: str) -> Iterator[None]:
    """Errors of `datasets` as a DataError that names the source."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        # `datasets` raises several unrelated types here; all of them are about what was named
        reason = f"{error}" if error.__cause__ is None else f"{error}: {error.__cause__}"
        raise DataError(not_loaded("data source", source, reason)) from error


def _ending_of(path: str | Path) -> str:
    """Of a file's name; of a compressed one that before it."""
    path = Path(path)
    return Path(path.stem).suffix if path.suffix in _COMPRESSED else path.suffix


def _reader_of(path: str | Path, source: str) -> str:
    reader = _READERS.get(_ending_of(path))
    if reader is None:
        raise DataError(
            f"data source {source}: expected a file ending in {', '.join(_READERS)}, or in such a "
            f"one and {', '.join(_COMPRESSED)}, got {Path(path).suffix or 'no ending'}"
        )
    if Path(path).suffix == ".zst" and "zstd" not in available_compressions():
        raise DataError(f"data source {source}: needs zstandard; pip install zstandard")
    return reader


def _load_file(path: Path, source: str, lines: bool) -> Dataset:
    reader = _reader_of(path, source)
    if path.stat().st_size == 0:
        raise DataError(f"data source {source}: expected rows, got an empty file")
    options = {"sample_by": "line" if lines else "document"} if reader == "text" else {}
    try:
        # to `datasets` a name is a pattern
        name = glob.escape(str(path))
        dataset = load_dataset(reader, data_files=name, split="train", **options)
        if reader == "json":
            dataset.data.validate(full=True)  # Arrow takes texts of JSON that are no UTF-8
    except Exception:
        if reader == "json" and path.suffix not in _COMPRESSED:
            _check_json(path, source)
        raise
    if lines:
        dataset = dataset.filter(_has_text)
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
    for number, line in enumerate(text.split("\n"), start=1):  # other ends stand inside of texts
        try:
            json.loads(line if line.strip() else "null")
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


def columns_of(section: SourceSection) -> dict[str, str]:
    """{our name: name in the source} of the columns that a section names."""
    columns = {str(ours): theirs for ours, theirs in section.columns.items()}
    if section.teacher_prompt is not None:
        columns[TEACHER_PROMPT] = section.teacher_prompt
    return columns


def with_columns(dataset: Dataset, columns: Mapping[str, str], source: str) -> Dataset:
    """The dataset with its columns under our names.

    Args:
        columns: {our name: name in the dataset}. ShareGPT's `conversations` need no entry.

    Raises:
        DataError: a column that is not there, or a name that is taken.
    """
    renames = renames_of(dataset.column_names, columns, source)
    taken = [name for name in renames.values() if name in dataset.column_names]
    dataset = dataset.remove_columns([name for name in taken if name not in renames])
    return dataset.rename_columns(renames)


def renames_of(names: list[str], columns: Mapping[str, str], source: str) -> dict[str, str]:
    """{name in the dataset: ours} where they differ; arguments and errors as of `with_columns`."""
    renames = dict(columns)
    if "conversations" in names and "messages" not in (*names, *renames):
        renames["messages"] = "conversations"
    for ours, theirs in renames.items():
        if theirs not in names:
            key = "teacher_prompt" if ours == TEACHER_PROMPT else f"columns.{ours}"
            raise DataError(
                f"data.{key}: expected a column of {source} ({', '.join(names)}), got {theirs}"
            )
    return {theirs: ours for ours, theirs in renames.items() if ours != theirs}


def detect_format(dataset: Dataset, wanted: str, source: str) -> str:
    """The format `wanted`, or with `auto` the first whose columns are there; DataError if none."""
    columns = set(dataset.column_names)
    candidates = COLUMNS if wanted == "auto" else {wanted: COLUMNS[wanted]}
    found = next((n for n, needed in candidates.items() if columns.issuperset(needed)), None)
    if TEACHER_PROMPT in columns and found != "prompt_completion":
        raise DataError(
            f"data.teacher_prompt: expected columns prompt and completion beside it in {source}, "
            f"got {', '.join(sorted(columns - {TEACHER_PROMPT}))}"
        )
    if found is not None:
        return found
    expected = " or ".join(" + ".join(needed) for needed in candidates.values())
    raise DataError(
        f"data source {source}: expected columns {expected}, got {', '.join(sorted(columns))}"
    )

"""Local files -> examples; a line that does not fit is an error with its number.

conll   a word per line in columns, by tabs or else spaces; an empty line ends a sentence
tsv     a header, then a pair per line; no quoting
csv     the same by commas, quoted
json    a list of objects, or an object per line
"""

import csv
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from datasets import ClassLabel, DatasetDict, List, load_from_disk

from modxfer_fast.config.task import COLUMNS, SPLITS, Split, TaskKind, TaskSection
from modxfer_fast.data.sources import is_saved_dataset
from modxfer_fast.data.tasks.examples import Corpus, Example, from_fields
from modxfer_fast.errors import DataError

_SPLIT_STEMS: dict[str, Split] = {
    **{split: split for split in SPLITS},
    **dict.fromkeys(("valid", "val", "dev"), SPLITS[1]),
}
_FORMATS = {
    ".conll": "conll",
    ".conllu": "conll",
    ".iob2": "conll",
    ".bio": "conll",
    ".tsv": "tsv",
    ".csv": "csv",
    ".json": "json",
    ".jsonl": "json",
}


def read_files(section: TaskSection) -> Corpus:
    """The splits that a section's `source` or `files` name; those without a file are absent.

    Raises:
        DataError: nothing there, an unknown format, or a malformed line, with its number.
    """
    named: dict[Split, list[Path]]
    if section.source is None:
        named = {
            split: [Path(p).expanduser() for p in ([paths] if isinstance(paths, str) else paths)]
            for split, paths in (section.files or {}).items()
        }
    else:
        path = Path(section.source).expanduser()
        if path.is_dir():
            if is_saved_dataset(path):
                return _read_saved(path, section)
            named = _files_of(path)
        else:
            named = {"train": [path]}
    return Corpus(
        {
            split: [ex for path in named[split] for ex in _read_file(path, section)]
            for split in SPLITS
            if split in named
        }
    )


def _files_of(folder: Path) -> dict[Split, list[Path]]:
    named: dict[Split, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        split = _SPLIT_STEMS.get(path.stem)
        if split is not None and path.suffix in {*_FORMATS, ".txt"}:
            named.setdefault(split, []).append(path)
    if "train" not in named:
        found = ", ".join(sorted(path.name for path in folder.iterdir())) or "an empty folder"
        raise DataError(
            f"task.source {folder}: expected a file named train, with one of the endings "
            f"{', '.join((*_FORMATS, '.txt'))}, got {found}"
        )
    for split, paths in named.items():
        if len(paths) > 1:
            raise DataError(
                f"task.source {folder}: expected one file for {split}, "
                f"got {', '.join(path.name for path in paths)}; name them in task.files"
            )
    return named


def _format(path: Path, section: TaskSection) -> str:
    if section.format != "auto":
        return section.format
    if path.suffix == ".txt":
        return "conll" if section.kind == "ner" else "tsv"
    if path.suffix not in _FORMATS:
        raise DataError(
            f"task file {path}: expected an ending among {', '.join((*_FORMATS, '.txt'))}, or "
            f"task.format, got {path.suffix or 'no ending'}"
        )
    return _FORMATS[path.suffix]


def _read_file(path: Path, section: TaskSection) -> list[Example]:
    if not path.is_file():
        raise DataError(f"task file {path}: no such file")
    fmt = _format(path, section)
    if (fmt == "conll") != (section.kind == "ner") and fmt != "json":
        wanted = "conll or json" if section.kind == "ner" else "tsv, csv or json"
        raise DataError(f"task file {path}: expected {wanted} for {section.kind}, got {fmt}")
    try:
        if fmt == "conll":
            return list(_read_conll(path, section.columns))
        columns = _named_columns(section)
        if fmt == "json":
            return list(_read_json(path, section.kind, columns))
        return list(_read_table(path, section.kind, columns, "\t" if fmt == "tsv" else ","))
    except (UnicodeDecodeError, OSError) as error:
        raise DataError(f"task file {path}: cannot be read ({error})") from error


def _named_columns(section: TaskSection) -> dict[str, str]:
    columns = {}
    for name in COLUMNS[section.kind]:
        column = section.columns.get(name, name)
        if not isinstance(column, str):
            raise DataError(f"task.columns.{name}: expected the name of a column, got {column!r}")
        columns[name] = column
    return columns


def _read_conll(path: Path, columns: dict[str, str | int]) -> Iterator[Example]:
    is_conllu = path.suffix == ".conllu"
    place = {"words": 1 if is_conllu else 0, "tags": -1}
    for name, column in columns.items():
        if not isinstance(column, int):
            raise DataError(
                f"task.columns.{name}: expected the index of a column of {path}, got {column!r}"
            )
        place[name] = column
    words: list[str] = []
    tags: list[str] = []
    first, width = 0, None
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            line = line.rstrip("\n")
            if not line.strip():
                if words:
                    yield Example(words, tags, f"{path}:{first}")
                    words, tags = [], []
                continue
            if line.startswith("-DOCSTART-") or (is_conllu and line.startswith("#")):
                continue
            fields = line.split("\t") if "\t" in line else line.split()
            if is_conllu and re.fullmatch(r"[0-9]+[-.][0-9]+", fields[0]):
                continue  # a range of words, or a node that is not in the text
            width = len(fields) if width is None else width
            if len(fields) != width:
                raise DataError(f"{path}:{number}: expected {width} columns, got {line!r}")
            for name, index in place.items():
                if not -width <= index < width:
                    raise DataError(
                        f"{path}:{number}: expected {name} in column {index}, "
                        f"got {width} columns: {line!r}"
                    )
            if place["words"] % width == place["tags"] % width:
                raise DataError(
                    f"{path}:{number}: expected words and tags in different columns, "
                    f"got {place['words']} and {place['tags']} of {width}: {line!r}"
                )
            word, tag = fields[place["words"]], fields[place["tags"]]
            if not word or not tag:
                raise DataError(f"{path}:{number}: expected a word and its tag, got {line!r}")
            first = first if words else number
            words.append(word)
            tags.append(tag)
    if words:
        yield Example(words, tags, f"{path}:{first}")


def _read_table(
    path: Path, kind: TaskKind, columns: dict[str, str], delimiter: str
) -> Iterator[Example]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(
            file,
            delimiter=delimiter,
            quoting=csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL,
            strict=True,
        )
        try:
            header = next(reader, [])
            missing = [name for name in columns.values() if name not in header]
            if missing:
                raise DataError(
                    f"{path}:1: expected columns {', '.join(columns.values())}, "
                    f"got {', '.join(header) or 'an empty file'}; name them in task.columns"
                )
            for row in reader:
                if not row:
                    continue
                where = f"{path}:{reader.line_num}"
                if len(row) != len(header):
                    raise DataError(
                        f"{where}: expected {len(header)} columns as in the header, "
                        f"got {len(row)}: {delimiter.join(row)!r}"
                    )
                yield from_fields(kind, dict(zip(header, row, strict=True)), columns, where)
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num}: {error}") from error


def _read_json(path: Path, kind: TaskKind, columns: dict[str, str]) -> Iterator[Example]:
    with path.open(encoding="utf-8-sig") as file:
        is_list = file.read(1024).lstrip().startswith("[")
        file.seek(0)
        rows: Iterable[tuple[str, Any]]
        try:
            if is_list:
                rows = [(f"{path}: item {i}", row) for i, row in enumerate(json.load(file))]
            else:
                rows = (
                    (f"{path}:{number}", _parse(line, f"{path}:{number}"))
                    for number, line in enumerate(file, 1)
                    if line.strip()
                )
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{error.lineno}: expected JSON, got {error.msg}") from error
        for where, row in rows:
            if not isinstance(row, dict):
                raise DataError(f"{where}: expected an object, got {type(row).__name__}")
            yield from_fields(kind, row, columns, where)


def _parse(line: str, where: str):
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: expected JSON, got {line.rstrip()!r} ({error.msg})") from error


def _read_saved(folder: Path, section: TaskSection) -> Corpus:
    """A folder that `datasets` saved, with one split or several."""
    try:
        saved = load_from_disk(str(folder))
    except Exception as error:
        # `datasets` raises several unrelated types here; all of them are about what was named
        raise DataError(f"task.source {folder}: cannot be loaded ({error})") from error
    halves = saved if isinstance(saved, DatasetDict) else {"train": saved}
    named = {_SPLIT_STEMS[name]: rows for name, rows in halves.items() if name in _SPLIT_STEMS}
    if "train" not in named:
        raise DataError(f"task.source {folder}: expected a split train, got {', '.join(saved)}")
    columns = _named_columns(section)
    splits: dict[Split, list[Example]] = {}
    labels: dict[Split, tuple[str, ...]] = {}
    for split, rows in named.items():
        classes = _class_names(rows.features.get(columns[COLUMNS[section.kind][-1]]))
        if classes is not None:
            labels[split] = tuple(classes)
        splits[split] = [
            _with_names(
                from_fields(section.kind, row, columns, f"{folder}: {split} row {i}"), classes
            )
            for i, row in enumerate(rows)
        ]
    for split, names in labels.items():
        if names != labels["train"]:
            raise DataError(
                f"task.source {folder}: expected the labels of train in {split}, "
                f"{', '.join(labels['train'])}, got {', '.join(names)}"
            )
    return Corpus(splits, labels.get("train"))


def _class_names(feature) -> list[str] | None:
    feature = feature.feature if isinstance(feature, List) else feature
    return feature.names if isinstance(feature, ClassLabel) else None


def _with_names(example: Example, names: list[str] | None) -> Example:
    if names is None:
        return example
    ids = [int(label) for label in example.labels]
    if min(ids) < 0:
        raise DataError(f"{example.where}: expected a label, got {min(ids)}")
    return example._replace(labels=[names[i] for i in ids])

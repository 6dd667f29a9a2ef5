"""One labelled example as it was read, before labels have ids."""

from dataclasses import dataclass
from typing import NamedTuple

from modxfer_fast.config.task import COLUMNS, Split, TaskKind
from modxfer_fast.errors import DataError


class Example(NamedTuple):
    """inputs: words, or two texts. labels: a tag per word, or one. where: for messages."""

    inputs: list[str]
    labels: list[str]
    where: str


@dataclass(frozen=True)
class Corpus:
    """Examples by split, and label names where the source fixes them.

    dropped: examples left out because the source gives them no label or no text.
    """

    splits: dict[Split, list[Example]]
    labels: tuple[str, ...] | None = None
    dropped: int = 0


def from_fields(kind: TaskKind, fields: dict, columns: dict[str, str], where: str) -> Example:
    """An example from named values, as JSON and saved datasets have them.

    Args:
        fields: column of the source -> value. columns: our name -> that of the source.
    """
    values = {}
    for ours, theirs in columns.items():
        if theirs not in fields:
            raise DataError(f"{where}: expected {theirs!r}, got {', '.join(map(repr, fields))}")
        values[ours] = fields[theirs]
    if kind != "ner":
        texts = [_text(values[name], columns[name], where) for name in COLUMNS[kind][:-1]]
        return Example(texts, [_label(values["label"], columns["label"], where)], where)
    for name in ("words", "tags"):
        if not isinstance(values[name], list):
            got = type(values[name]).__name__
            raise DataError(f"{where}: expected a list in {columns[name]!r}, got {got}")
    words = [_text(word, columns["words"], where) for word in values["words"]]
    tags = [_label(tag, columns["tags"], where) for tag in values["tags"]]
    if len(words) != len(tags) or not words:
        raise DataError(
            f"{where}: expected as many {columns['tags']} as {columns['words']}, at least one, "
            f"got {len(tags)} and {len(words)}"
        )
    return Example(words, tags, where)


def _text(value, column: str, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise DataError(f"{where}: expected text in {column!r}, got {value!r}")
    return value


def _label(value, column: str, where: str) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        raise DataError(f"{where}: expected a label in {column!r}, got {value!r}")
    return str(value)

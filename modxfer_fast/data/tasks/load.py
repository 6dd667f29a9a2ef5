"""A task section -> labelled examples in three splits."""

import hashlib
import json
import re
from dataclasses import dataclass

import numpy as np
from datasets import ClassLabel, Dataset, Features, List, Value

from modxfer_fast.config.task import COLUMNS, HUB_KINDS, SPLITS, Split, TaskKind, TaskSection
from modxfer_fast.data.tasks.examples import Corpus, Example
from modxfer_fast.data.tasks.files import read_files
from modxfer_fast.data.tasks.hub import read_hub
from modxfer_fast.errors import DataError

_TAG = re.compile(r"(?P<prefix>[BIES])-(?P<type>.+)")
_HELD_OUT = 0.1


@dataclass(frozen=True)
class TaskData:
    """Labelled examples.

    train, validation, test: of ner `words` and `tags`, a class per word; of nli and paraphrase
        `text_a`, `text_b` and `label`.
    labels: names in the order of their ids.
    max_length: tokens of an encoded example.
    train_examples: those there were before the limit and the fraction. dropped: those that the
        source gives no label or no text.
    """

    kind: TaskKind
    language: str | None
    labels: tuple[str, ...]
    train: Dataset
    validation: Dataset
    test: Dataset
    max_length: int
    train_examples: int
    dropped: int = 0

    def split(self, name: str) -> Dataset:
        """One of train, validation and test."""
        if name not in SPLITS:
            raise DataError(f"split: expected one of {', '.join(SPLITS)}, got {name!r}")
        return getattr(self, name)

    def texts(self, split: str = "train") -> list[list[str]] | list[tuple[str, str]]:
        """The examples without labels: words, or pairs of texts."""
        rows = self.split(split)
        if self.kind == "ner":
            return list(rows["words"])
        return list(zip(rows["text_a"], rows["text_b"], strict=True))

    def facts(self) -> dict[str, object]:
        """What a report says about the data."""
        return {
            "kind": self.kind,
            "language": self.language,
            "labels": list(self.labels),
            **{split: len(self.split(split)) for split in SPLITS},
            "train_examples": self.train_examples,
            "dropped": self.dropped,
            "max_length": self.max_length,
        }

    def digest(self) -> str:
        """Short hash of the task, its labels and all examples in their order."""
        digest = hashlib.sha256(json.dumps([self.kind, self.labels]).encode())
        for split in SPLITS:
            digest.update(split.encode())
            for row in self.split(split):
                digest.update(json.dumps(row, sort_keys=True).encode())
        return digest.hexdigest()[:16]


def load_task(section: TaskSection) -> TaskData:
    """Read, split and limit the examples of a task.

    Raises:
        DataError: a source that is missing or malformed, with the line; labels of validation or
            test that train does not have; a split without examples.
    """
    corpus = read_hub(section) if section.source in HUB_KINDS else read_files(section)
    for split, examples in corpus.splits.items():
        if not examples:
            raise DataError(f"task: expected examples in {split}, got none")
    labels = _label_names(corpus, section)
    splits = _hold_out(corpus.splits, section.split_seed)
    kept = {}
    for stream, split in enumerate(SPLITS):
        examples, limit = splits[split], getattr(section, f"max_{split}_examples")
        fraction = section.train_fraction if split == "train" else 1.0
        indices = _share(len(examples), limit, fraction, section.split_seed, stream)
        kept[split] = _dataset(section.kind, [examples[i] for i in indices], labels)
    return TaskData(
        kind=section.kind,
        language=section.language,
        labels=labels,
        **kept,
        max_length=section.max_length,
        train_examples=len(splits["train"]),
        dropped=corpus.dropped,
    )


def _label_names(corpus: Corpus, section: TaskSection) -> tuple[str, ...]:
    """Names by id. With `task.labels`, examples labelled by ids get their names in `corpus`."""
    if section.labels is not None:
        names = tuple(section.labels)
        if corpus.labels is not None and set(corpus.labels) != set(names):
            raise DataError(
                f"task.labels: expected those of the data, {', '.join(corpus.labels)}, "
                f"got {', '.join(names)}"
            )
        _resolve_labels(corpus.splits, names)
        return names
    if corpus.labels is not None:
        return corpus.labels
    found = {
        split: {label for example in examples for label in example.labels}
        for split, examples in corpus.splits.items()
    }
    if section.kind == "ner":
        names = _iob_names(corpus.splits, found["train"])
    else:
        names = tuple(sorted(found["train"]))
    if len(names) < 2:
        raise DataError(f"task: expected at least 2 labels in train, got {', '.join(names)}")
    for split, theirs in found.items():
        if not theirs <= set(names):
            raise DataError(
                f"task: expected the labels of train in {split}, {', '.join(names)}, "
                f"got {', '.join(sorted(theirs))}; give task.labels if train merely lacks some"
            )
    return names


def _iob_names(splits: dict[Split, list[Example]], found: set[str]) -> tuple[str, ...]:
    """O, then B- and I- (and E-, S- where they occur) of every type, whichever of them occur."""
    for examples in splits.values():
        for example in examples:
            for word, tag in zip(example.inputs, example.labels, strict=True):
                if tag != "O" and not _TAG.fullmatch(tag):
                    raise DataError(
                        f"{example.where}: expected O or a tag such as B-PER for {word!r}, "
                        f"got {tag!r}"
                    )
    matches = [match for match in map(_TAG.fullmatch, found) if match]  # none for O
    types = sorted({match["type"] for match in matches})
    prefixes = [p for p in "BIES" if p in "BI" or any(match["prefix"] == p for match in matches)]
    return ("O", *(f"{prefix}-{kind}" for kind in types for prefix in prefixes))


def _resolve_labels(splits: dict[Split, list[Example]], names: tuple[str, ...]) -> None:
    """Give labels that are ids their names, in place; refuse those that are neither."""
    known = set(names)
    by_id = {} if any(n.isdigit() for n in names) else {str(i): n for i, n in enumerate(names)}
    for examples in splits.values():
        for i, example in enumerate(examples):
            for label in example.labels:
                if label not in known and label not in by_id:
                    raise DataError(
                        f"{example.where}: expected one of task.labels, {', '.join(names)}, "
                        f"got {label!r}"
                    )
            resolved = [label if label in known else by_id[label] for label in example.labels]
            examples[i] = example._replace(labels=resolved)


def _hold_out(splits: dict[Split, list[Example]], seed: int) -> dict[Split, list[Example]]:
    """All three splits; each that is absent is a tenth of train, drawn by `seed`."""
    absent = [split for split in SPLITS[1:] if split not in splits]
    if not absent:
        return splits
    train = splits["train"]
    size = max(1, round(_HELD_OUT * len(train)))
    if len(train) <= size * len(absent):
        raise DataError(
            f"task: expected at least {len(absent) + 1} examples to hold out "
            f"{' and '.join(absent)}, got {len(train)}"
        )
    order = np.random.default_rng(seed).permutation(len(train))
    splits = dict(splits)
    for i, split in enumerate(absent):
        splits[split] = [train[j] for j in sorted(order[i * size : (i + 1) * size])]
    splits["train"] = [train[j] for j in sorted(order[size * len(absent) :])]
    return splits


def _share(size: int, limit: int | None, fraction: float, seed: int, stream: int) -> list[int]:
    """Indices of `fraction` of at most `limit` examples, in order; smaller ones are nested."""
    limit = size if limit is None else min(limit, size)
    count = max(1, round(fraction * limit))
    order = np.random.default_rng((seed, stream + 1)).permutation(size)
    return sorted(order[:count].tolist())


def _dataset(kind: TaskKind, examples: list[Example], labels: tuple[str, ...]) -> Dataset:
    text, classes = Value("string"), ClassLabel(names=list(labels))
    ids = {name: i for i, name in enumerate(labels)}
    inputs = [example.inputs for example in examples]
    targets = [[ids[label] for label in example.labels] for example in examples]
    if kind == "ner":
        features, columns = [List(text), List(classes)], [inputs, targets]
    else:
        features = [text, text, classes]
        columns = [[row[i] for row in inputs] for i in (0, 1)] + [[i for (i,) in targets]]
    names = COLUMNS[kind]
    return Dataset.from_dict(
        dict(zip(names, columns, strict=True)),
        features=Features(dict(zip(names, features, strict=True))),
    )

"""WikiNEuRal, XNLI and PAWS-X from the hub -> examples."""

from typing import NamedTuple

from datasets import Dataset, load_dataset

from modxfer_fast.config.task import SPLITS, Split, TaskSection
from modxfer_fast.data.tasks.examples import Corpus, Example
from modxfer_fast.errors import DataError


class _HubCorpus(NamedTuple):
    """path: hub id. config, splits: names for a language, `{}` stands for it.
    inputs, label: columns. labels: names by id."""

    path: str
    config: str | None
    splits: dict[Split, str]
    inputs: tuple[str, ...]
    label: str
    labels: tuple[str, ...]


_SAME_NAMES: dict[Split, str] = {split: split for split in SPLITS}
_CORPORA = {
    "wikineural": _HubCorpus(
        "Babelscape/wikineural",
        None,
        {"train": "train_{}", "validation": "val_{}", "test": "test_{}"},
        ("tokens",),
        "ner_tags",
        # the dataset carries bare ids; the names are those of its card
        ("O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC", "B-MISC", "I-MISC"),
    ),
    "xnli": _HubCorpus(
        "facebook/xnli",
        "{}",
        _SAME_NAMES,
        ("premise", "hypothesis"),
        "label",
        ("entailment", "neutral", "contradiction"),
    ),
    "paws-x": _HubCorpus(
        "google-research-datasets/paws-x",
        "{}",
        _SAME_NAMES,
        ("sentence1", "sentence2"),
        "label",
        ("not_paraphrase", "paraphrase"),
    ),
}


def read_hub(section: TaskSection) -> Corpus:
    """All three splits of a corpus of the hub in one language.

    PAWS-X marks pairs whose label or translation is missing; they are left out and counted.

    Raises:
        DataError: no access to the hub, or columns and labels other than known here.
    """
    corpus = _CORPORA[section.source or ""]
    config = corpus.config and corpus.config.format(section.language)
    splits, dropped = {}, 0
    for split in SPLITS:
        name = corpus.splits[split].format(section.language)
        try:
            rows = load_dataset(corpus.path, config, split=name, revision=section.revision)
        except Exception as error:
            # `datasets` raises several unrelated types here; all of them are about what was named
            raise DataError(
                f"task.source {section.source}: {corpus.path}, split {name}, cannot be loaded "
                f"({error}); without access to the hub name local files in task.files"
            ) from error
        splits[split] = _examples(rows, corpus, f"{corpus.path} {name}")
        dropped += len(rows) - len(splits[split])
    return Corpus(splits, corpus.labels, dropped)


def _examples(rows: Dataset, corpus: _HubCorpus, where: str) -> list[Example]:
    needed = (*corpus.inputs, corpus.label)
    if not set(needed) <= set(rows.column_names):
        raise DataError(
            f"{where}: expected columns {', '.join(needed)}, got {', '.join(rows.column_names)}"
        )
    *inputs, labels = (list(rows[name]) for name in needed)
    is_ner = len(corpus.inputs) == 1
    found = []
    for i, label in enumerate(labels):
        ids = label if is_ner else [label]
        words = inputs[0][i] if is_ner else [column[i] for column in inputs]
        if not words or not all(words) or min(ids) < 0:
            continue
        if max(ids) >= len(corpus.labels) or (is_ner and len(ids) != len(words)):
            raise DataError(
                f"{where}: row {i}: expected labels below {len(corpus.labels)}, one per word, "
                f"got {ids}"
            )
        found.append(Example(words, [corpus.labels[i] for i in ids], f"{where} row {i}"))
    return found

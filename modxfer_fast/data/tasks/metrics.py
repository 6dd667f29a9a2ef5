"""Scores of predictions: entity-level F1 by nervaluate, accuracy and macro F1 by scikit-learn."""

from collections.abc import Sequence

import numpy as np
from nervaluate import Evaluator
from sklearn.metrics import accuracy_score, f1_score

from modxfer_fast.data.collator import IGNORE_INDEX
from modxfer_fast.data.tasks.encoding import EncodedTask

# The score that selects and is compared.
PRIMARY_METRIC = {"ner": "f1", "nli": "accuracy", "paraphrase": "accuracy"}


def entity_scores(
    gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]
) -> dict[str, float]:
    """Micro averages over entities, where type and both borders must match.

    gold, predicted: tags by row, IOB2 or IOBES.
    """
    gold, predicted = ([_iob2(row) for row in side] for side in (gold, predicted))
    types = {tag[2:] for row in (*gold, *predicted) for tag in row if tag != "O"}
    names = ("f1", "precision", "recall")
    if not types:  # nothing to find, nothing found
        return dict.fromkeys(names, 0.0)
    evaluator = Evaluator(gold, predicted, tags=sorted(types), loader="list")
    scores = evaluator.evaluate()["overall"]["strict"]
    return {name: float(getattr(scores, name)) for name in names}


def _iob2(tags: Sequence[str]) -> list[str]:
    """With B- on the first word of each entity, I- on the others, and no other prefix."""
    found, inside = [], None  # the type that the next word may continue
    for tag in tags:
        prefix, kind = tag[:1], tag[2:]
        ours = "I" if prefix in "IE" and kind == inside else "B"
        found.append(tag if tag == "O" else f"{ours}-{kind}")
        inside = None if prefix in "OES" else kind
    return found


def class_scores(gold: Sequence[int], predicted: Sequence[int]) -> dict[str, float]:
    return {
        "accuracy": float(accuracy_score(gold, predicted)),
        "macro_f1": float(f1_score(gold, predicted, average="macro", zero_division=0)),
    }


def task_scores(encoded: EncodedTask, predicted: np.ndarray, labels: np.ndarray) -> dict:
    """Scores over all words or pairs of a split.

    A word whose tag no token carries, because it was truncated or has no token, is predicted as O:
    so two tokenizers are scored on the same entities.

    Args:
        predicted: classes [rows, T], or [rows] for pairs. labels: what the rows carry, same shape.
    """
    if encoded.kind != "ner":
        return class_scores(encoded.gold, predicted.tolist())
    names = encoded.labels
    tags = []
    for row, (gold, words) in enumerate(zip(encoded.gold, encoded.labelled_words, strict=True)):
        row_tags = ["O"] * len(gold)
        carried = predicted[row][labels[row] != IGNORE_INDEX]
        for word, tag in zip(words, carried.tolist(), strict=True):
            row_tags[word] = names[tag]
        tags.append(row_tags)
    return entity_scores([[names[i] for i in gold] for gold in encoded.gold], tags)

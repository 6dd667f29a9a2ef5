"""Texts of a task -> the batches on which one classifier learns from another."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modxfer_fast.data.collator import IGNORE_INDEX


@dataclass(frozen=True)
class TaskTextCollator:
    """Texts -> a batch of a classifier and its teacher, for one tokenizer or two.

    A text is {"words": [...]}, for token classifiers, or {"text_a", "text_b"} or {"text_a"}, for
    sequence classifiers; with "tags", a class per word, or "label" the batch has labels. Of words
    those count that neither side cuts off; sequences are compared whole, also where one is cut.

    teacher_tokenizer: None where it is the student's.
    max_length: tokens at most, and at most those that a tokenizer allows.

    Batch, B texts of T tokens, beside the inputs of the student:
        rows            [n] int64, b * T + t of the first sub-token of each word that counts
        teacher_inputs, teacher_rows: the same of the teacher, where it has a tokenizer of its own
        labels          [B, T] int64, -100 but at `rows`, or [B]; where the texts have any
    Of sequences there are no rows.
    """

    student_tokenizer: Any
    teacher_tokenizer: Any = None
    max_length: int = 128

    def __call__(self, texts: list[dict]) -> dict[str, Any]:
        batch, words = self._encode(self.student_tokenizer, texts)
        theirs = None
        if self.teacher_tokenizer is not None:
            batch["teacher_inputs"], theirs = self._encode(self.teacher_tokenizer, texts)
        if words is None:
            if "label" in texts[0]:
                batch["labels"] = torch.tensor([text["label"] for text in texts])
            return batch
        kept = [list(row) for row in words]
        if theirs is not None:
            kept = [[w for w in row if w in other] for row, other in zip(kept, theirs, strict=True)]
            batch["teacher_rows"] = _indices(batch["teacher_inputs"], theirs, kept)
        batch["rows"] = _indices(batch, words, kept)
        if "tags" in texts[0]:
            tags = [t["tags"][w] for t, row in zip(texts, kept, strict=True) for w in row]
            labels = torch.full_like(batch["input_ids"], IGNORE_INDEX)
            labels.view(-1)[batch["rows"]] = torch.tensor(tags, dtype=labels.dtype)
            batch["labels"] = labels
        return batch

    def _encode(self, tokenizer, texts: list[dict]):
        """Padded inputs, and of each text {word: its first token}, None without words."""
        options = {
            "truncation": True,
            "max_length": min(self.max_length, tokenizer.model_max_length),
            "padding": True,
            "return_tensors": "pt",
            "verbose": False,
        }
        if "words" not in texts[0]:
            keys = [key for key in ("text_a", "text_b") if key in texts[0]]
            pairs = [[text[key] for text in texts] for key in keys]
            return dict(tokenizer(*pairs, **options)), None
        encoded = tokenizer([text["words"] for text in texts], is_split_into_words=True, **options)
        firsts = []
        for row in range(len(texts)):
            words: dict[int, int] = {}
            for token, word in enumerate(encoded.word_ids(row)):
                if word is not None:
                    words.setdefault(word, token)
            firsts.append(words)
        return dict(encoded), firsts


def _indices(inputs: dict, firsts: list[dict[int, int]], words: list[list[int]]) -> Tensor:
    width = inputs["input_ids"].shape[1]
    return torch.tensor(
        [row * width + firsts[row][word] for row in range(len(firsts)) for word in words[row]],
        dtype=torch.int64,
    )

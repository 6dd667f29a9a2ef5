"""Rows, or texts of a task, -> the batch of the engine, with labels already aligned."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from modxfer_fast.data.facts import OF_TEACHER, facts_of_tokens

IGNORE_INDEX = -100
# transformers' names of where packed documents begin and end
VARLEN = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


@dataclass(frozen=True)
class CausalCollator:
    """Pad rows on the right and lay out targets.

    Batch, beside that of `EncoderCollator`:
        position_ids   [B, T] int64, restarting at every document of a row; only with `packed`, as
        cu_seq_lens_q, cu_seq_lens_k: [n + 1] int32, where documents begin in the rows laid end to
                       end, and B T behind them; max_length_q, max_length_k, ints, of the longest:
                       what variable-length attention of transformers takes
        labels         [B, T] int64; labels[t] is the target of position t, that is token t + 1 of
                       the same document; -100 where there is none
        num_valid      int, number of labels that are not -100
        token_weights  [B, T] float32, the factor of each token's loss; of rows that have it
        teacher_inputs, teacher_rows: of rows whose teacher reads prompts of its own: the inputs
                       [B, T'] of its model, and [B, T] int64, b * T' + t of the teacher's position
                       that predicts the same target; 0 where there is none
        teacher_index  [B, T] int64, the number of each token's teacher; of rows that have it

    Of a packed batch the engine hands a model the positions and not the mask: transformers keeps
    documents apart by their positions only when it gets no mask, and no token sees the padding on
    its right. Rows of one document need no positions, which some architectures do not take.
    """

    labels_are_aligned: ClassVar[bool] = True

    pad_token_id: int
    packed: bool = True

    def __post_init__(self):
        if not isinstance(self.pad_token_id, int):
            raise TypeError(
                "pad_token_id: expected an int, any id of the vocabulary will do, got "
                f"{self.pad_token_id!r}"
            )

    def __call__(self, rows: list[dict]) -> dict[str, Any]:
        batch = self._laid_out(rows)
        labels = batch["labels"]
        batch |= {"num_valid": int((labels != IGNORE_INDEX).sum()), **facts_of_tokens(rows)}
        if OF_TEACHER[0] not in rows[0]:
            return batch
        theirs = self._laid_out([_of_teacher(row) for row in rows])
        counts, counts_there = (labels != IGNORE_INDEX), (theirs["labels"] != IGNORE_INDEX)
        if not torch.equal(labels[counts], theirs["labels"][counts_there]):
            raise ValueError(f"{OF_TEACHER[0]}: expected the targets of input_ids, got others")
        teacher_rows = torch.zeros_like(labels)
        teacher_rows[counts] = counts_there.flatten().nonzero().flatten()
        inputs = ("input_ids", "attention_mask", "position_ids")
        of_teacher = {name: theirs[name] for name in inputs if name in theirs}
        return {**batch, "teacher_inputs": of_teacher, "teacher_rows": teacher_rows}

    def _laid_out(self, rows: list[dict]) -> dict[str, Any]:
        """Inputs and labels."""
        T = max(len(row["input_ids"]) for row in rows)
        targets, positions = [], []
        all_runs: list[int] = []
        for row in rows:
            *lengths, last = row["lengths"]
            ids = torch.tensor(row["input_ids"])
            target = torch.where(torch.tensor(row["is_target"]), ids, IGNORE_INDEX)
            target[torch.tensor([0, *lengths]).cumsum(0)] = IGNORE_INDEX  # of no earlier token
            targets.append(target.roll(-1))
            # padding goes on counting: it belongs to the last document and costs no mask of its own
            runs = (*lengths, last + T - len(ids))
            all_runs += runs
            positions.append(torch.cat([torch.arange(run) for run in runs]))
        labels = pad_sequence(targets, batch_first=True, padding_value=IGNORE_INDEX)
        batch = {**EncoderCollator(self.pad_token_id)(rows), "labels": labels}
        if not self.packed:
            return batch
        starts = torch.tensor([0, *all_runs]).cumsum(0, dtype=torch.int32)
        ends = (starts, starts, max(all_runs), max(all_runs))
        return {
            **batch,
            "position_ids": torch.stack(positions),
            **dict(zip(VARLEN, ends, strict=True)),
        }


def _of_teacher(row: dict) -> dict:
    """What the teacher reads of a row, as a row."""
    ids, is_target = (row[name] for name in OF_TEACHER)
    return {"input_ids": ids, "is_target": is_target, "lengths": row["teacher_lengths"]}


@dataclass(frozen=True)
class EncoderCollator:
    """Pad rows of text on the right, without labels.

    Batch, B rows of T tokens, T of the longest row:
        input_ids      [B, T] int64
        attention_mask [B, T] int64, 0 on padding
        num_tokens     int, number of tokens that are no padding
    """

    pad_token_id: int

    def __call__(self, rows: list[dict]) -> dict[str, Tensor | int]:
        ids = [torch.tensor(row["input_ids"]) for row in rows]
        return {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.pad_token_id),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
            "num_tokens": sum(map(len, ids)),
        }


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
        return dict(encoded), [first_tokens(encoded.word_ids(row)) for row in range(len(texts))]


def _indices(inputs: dict, firsts: list[dict[int, int]], words: list[list[int]]) -> Tensor:
    width = inputs["input_ids"].shape[1]
    return torch.tensor(
        [row * width + firsts[row][word] for row in range(len(firsts)) for word in words[row]],
        dtype=torch.int64,
    )


def first_tokens(words: Sequence[int | None]) -> dict[int, int]:
    """The first token of each word, from the word of every token."""
    firsts: dict[int, int] = {}
    for token, word in enumerate(words):
        if word is not None:
            firsts.setdefault(word, token)
    return firsts

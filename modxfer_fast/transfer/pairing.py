"""Texts to batches for two models, and from the features of each model to rows they share.

Teacher and student are compared on rows that mean the same on both sides:

    words       words of the text, given or cut at white space, their tokens pooled
    spans       shortest runs of characters that both tokenizers cut out: with one tokenizer its
                tokens; and finer than words in scripts that do not write spaces
    positions   token i of both where the pieces are equal strings: the rule of the reference, which
                loses what follows the first word that the two cut into a different number

A token that reaches over several words joins them. Padding is never in a row, and special tokens
only in `positions`, where they are equal with one tokenizer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from modxfer_fast.config.transfer_names import PAIRINGS, POOLINGS
from modxfer_fast.data import tokenizer_digest
from modxfer_fast.transfer import alignment
from modxfer_fast.transfer.alignment import Row, Text, TokenizedText
from modxfer_fast.transfer.errors import TransferError, check_choice


@dataclass(frozen=True)
class Pooling:
    """The tokens of each row.

    Attributes:
        tokens: [M] int64, b * T + t of every token, those of a row side by side.
        starts: [n] int64, where in `tokens` a row begins.
    """

    tokens: Tensor
    starts: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """Mean over each row's tokens, [B, T, D] to [n, D]; half precision becomes fp32."""
        flat = features.flatten(0, 1)
        dtype = torch.promote_types(flat.dtype, torch.float32)
        if self.starts.numel() == self.tokens.numel():
            return flat.index_select(0, self.tokens).to(dtype)
        # in fp64 a feature that is constant has the same mean in every row, which it must have to
        # count as one; and the order is fixed, unlike that of index_add on a GPU
        means = F.embedding_bag(self.tokens, flat.double(), self.starts, mode="mean")
        return means.to(dtype)

    def to(self, device: torch.device | str) -> "Pooling":
        return Pooling(self.tokens.to(device), self.starts.to(device))


class PairCounts(NamedTuple):
    """What became of the student's tokens.

    Attributes:
        examples: texts. rows: those that both sides have.
        student_tokens: the student's tokens before truncation, without special ones.
        kept_tokens: those of them that are in a row.
    """

    examples: int = 0
    rows: int = 0
    student_tokens: int = 0
    kept_tokens: int = 0

    def plus(self, other: "PairCounts") -> "PairCounts":
        return PairCounts(*(a + b for a, b in zip(self, other, strict=True)))

    @property
    def kept_fraction(self) -> float:
        """kept_tokens / student_tokens."""
        return self.kept_tokens / self.student_tokens if self.student_tokens else 0.0


@dataclass(frozen=True)
class PairedBatch:
    """The same texts for both models, and the rows they share.

    Attributes:
        teacher_inputs, student_inputs: what the models are called with, each [B, T] of its own T.
        teacher_pool, student_pool: features [B, T, D] to rows [n, D], the same n in the same order.
    """

    teacher_inputs: Mapping[str, Tensor]
    student_inputs: Mapping[str, Tensor]
    teacher_pool: Pooling
    student_pool: Pooling
    counts: PairCounts

    @classmethod
    def of_ids(cls, input_ids: Tensor, attention_mask: Tensor | None = None) -> "PairedBatch":
        """Both models read the same ids [B, T]; each token that the mask [B, T] leaves is a row.

        Raises:
            TransferError: ids or a mask of another shape.
        """
        if input_ids.dim() != 2:
            raise TransferError(f"input_ids: expected shape [B, T], got {list(input_ids.shape)}")
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            raise TransferError(
                f"attention_mask: expected the shape of input_ids, {list(input_ids.shape)}, "
                f"got {list(attention_mask.shape)}"
            )
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        inputs = {"input_ids": input_ids, "attention_mask": mask}
        tokens = mask.flatten().nonzero().flatten()
        pool = Pooling(tokens, torch.arange(len(tokens), device=tokens.device))
        counts = PairCounts(len(input_ids), len(tokens), len(tokens), len(tokens))
        return cls(inputs, inputs, pool, pool, counts)


@dataclass(frozen=True)
class Pairing:
    """How texts become rows.

    Attributes:
        kind: "words", "spans" or "positions".
        pooling: "mean" of a row's tokens, or its "first" token.
        max_length: tokens of an example with special ones; at most what the tokenizer allows. A row
            that loses a token to truncation, on either side, is dropped.
        batch_size: examples in a batch, padded to the longest.

    Raises:
        TransferError: unknown kind or pooling, or a size below 1.
    """

    kind: str = "words"
    pooling: str = "mean"
    max_length: int = 256
    batch_size: int = 16

    def __post_init__(self):
        for name, known in (("kind", PAIRINGS), ("pooling", POOLINGS)):
            check_choice(name, getattr(self, name), known)
        for name in ("max_length", "batch_size"):
            if getattr(self, name) < 1:
                raise TransferError(f"{name}: expected at least 1, got {getattr(self, name)}")

    def batches(
        self,
        examples: Sequence[alignment.Example],
        teacher_tokenizer: PreTrainedTokenizerBase,
        student_tokenizer: PreTrainedTokenizerBase,
    ) -> "PairedBatches":
        """Batches of the examples in their order; each is encoded when it is asked for.

        Args:
            examples: texts, lists of words (read with one space between them), or tuples of two
                texts, which the models read as a pair.

        Raises:
            TransferError: no examples, an example of another form, pairs among single texts, a
                tokenizer that is slow or has no padding token.
        """
        return PairedBatches(self, examples, teacher_tokenizer, student_tokenizer)


class PairedBatches(Sequence[PairedBatch]):
    """What `Pairing.batches` returns.

    Attributes:
        facts: the pairing's options and digests of both tokenizers.
    """

    def __init__(
        self,
        pairing: Pairing,
        examples: Sequence[alignment.Example],
        teacher_tokenizer: PreTrainedTokenizerBase,
        student_tokenizer: PreTrainedTokenizerBase,
    ):
        self._pairing = pairing
        self._texts = [Text.of(example, i) for i, example in enumerate(examples)]
        if not self._texts:
            raise TransferError("examples: expected at least one, got none")
        if len({text.second is None for text in self._texts}) > 1:
            raise TransferError("examples: expected only pairs or only single texts, got both")
        is_pair = self._texts[0].second is not None
        self._teacher, self._student = (
            alignment.Side(tokenizer, role, pairing.max_length, is_pair=is_pair)
            for tokenizer, role in ((teacher_tokenizer, "teacher"), (student_tokenizer, "student"))
        )
        options = asdict(pairing)
        self.facts: dict[str, Any] = {
            "pairing": options.pop("kind"),
            **options,
            "teacher_tokenizer": tokenizer_digest(teacher_tokenizer),
            "student_tokenizer": tokenizer_digest(student_tokenizer),
        }

    def __len__(self) -> int:
        return -(-len(self._texts) // self._pairing.batch_size)

    def __getitem__(self, index: int) -> PairedBatch:  # type: ignore[override]  # no slices
        if not 0 <= index < len(self):
            raise IndexError(f"index: expected 0 to {len(self) - 1}, got {index}")
        size = self._pairing.batch_size
        texts = self._texts[index * size : (index + 1) * size]
        teacher_inputs, teacher = self._teacher.encode(texts)
        student_inputs, student = self._student.encode(texts)
        rows = [self._rows(*sides) for sides in zip(texts, teacher, student, strict=True)]
        return PairedBatch(
            teacher_inputs,
            student_inputs,
            self._pool([[theirs for theirs, _ in of_text] for of_text in rows], teacher_inputs),
            self._pool([[mine for _, mine in of_text] for of_text in rows], student_inputs),
            _counts(student, rows),
        )

    def _rows(self, text: Text, teacher: TokenizedText, student: TokenizedText) -> list[Row]:
        if self._pairing.kind == "positions":
            return alignment.position_rows(teacher, student)
        return alignment.span_rows(
            text, teacher, student, whole_words=self._pairing.kind == "words"
        )

    def _pool(self, rows: list[list[list[int]]], inputs: Mapping[str, Tensor]) -> Pooling:
        """Pooling of the positions of every row of every text."""
        width = inputs["input_ids"].shape[1]
        used = slice(1) if self._pairing.pooling == "first" else slice(None)
        tokens: list[int] = []
        starts: list[int] = []
        for i, of_text in enumerate(rows):
            for positions in of_text:
                starts.append(len(tokens))
                tokens += [i * width + position for position in positions[used]]
        return Pooling(*(torch.tensor(part, dtype=torch.int64) for part in (tokens, starts)))


def _counts(student: Sequence[TokenizedText], rows: Sequence[Sequence[Row]]) -> PairCounts:
    return PairCounts(
        examples=len(student),
        rows=sum(map(len, rows)),
        student_tokens=sum(len(tokens.content) for tokens in student),
        kept_tokens=sum(
            tokens.spans[position] is not None
            for tokens, of_text in zip(student, rows, strict=True)
            for _, mine in of_text
            for position in mine
        ),
    )

"""Which tokens of two tokenizers stand for the same piece of one text.

A fast tokenizer reports the characters of every token, so two of them meet on characters whatever
their vocabularies. All characters of an example are on one axis: those of a second text come after
the first one's, with a gap of one.
"""

import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tokenizers import Encoding
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from modxfer_fast.transfer.errors import TransferError

Example = str | list[str] | tuple[str, str]
Span = tuple[int, int]
Row = tuple[list[int], list[int]]
"""Positions in the teacher's and in the student's sequence."""

_WORD_STARTS = ("\u2581", "\u0120")  # SentencePiece's mark and that of byte-level BPE


@dataclass(frozen=True)
class Text:
    """One example.

    Attributes:
        first, second: what the model reads; second is None but for pairs.
        words: characters of each word.
    """

    first: str
    second: str | None
    words: tuple[Span, ...]

    @classmethod
    def of(cls, example: Example, index: int) -> "Text":
        """Of a text, a list of words, or a tuple of two texts; `index` names it in errors."""
        if isinstance(example, str):
            return cls(example, None, tuple(_runs(example)))
        if not isinstance(example, list | tuple):
            raise TransferError(
                f"examples[{index}]: expected a text, a list of words or a tuple of two texts, "
                f"got {type(example).__name__}"
            )
        if not all(isinstance(part, str) for part in example):
            kinds = sorted({type(part).__name__ for part in example})
            raise TransferError(f"examples[{index}]: expected strings, got {', '.join(kinds)}")
        if isinstance(example, tuple):
            if len(example) != 2:
                raise TransferError(
                    f"examples[{index}]: expected a tuple of two texts (a list for words), "
                    f"got {len(example)}"
                )
            return cls(*example, tuple(_runs(" ".join(example))))
        words, start = [], 0
        for word in example:
            words.append((start, start + len(word)))
            start += len(word) + 1
        return cls(" ".join(example), None, tuple(w for w in words if w[0] < w[1]))


@dataclass(frozen=True)
class TokenizedText:
    """One text in the eyes of one tokenizer.

    Attributes:
        spans: characters of the token at each position of the model's input; None for special
            tokens, padding and white space at the end.
        pieces: the token at each position in WordPiece's spelling; None for padding.
        content: spans of all tokens, also of those that truncation cut off.
    """

    spans: list[Span | None]
    pieces: list[str | None]
    content: list[Span]


class Side:
    """The tokenizer of the teacher or of the student; `is_pair` of pairs of texts."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, role: str, max_length: int, *, is_pair: bool
    ):
        if not tokenizer.is_fast:
            raise TransferError(
                f"{role}_tokenizer: expected a fast tokenizer, which reports the characters of "
                f"each token, got {type(tokenizer).__name__}"
            )
        if tokenizer.pad_token_id is None:
            raise TransferError(
                f"{role}_tokenizer: expected a padding token, got none; set its pad_token, "
                "e.g. to its eos_token"
            )
        num_special = tokenizer.num_special_tokens_to_add(pair=is_pair)
        if max_length <= num_special:
            raise TransferError(
                f"max_length: expected more than the {num_special} special tokens of the "
                f"{role}'s tokenizer, got {max_length}"
            )
        self._tokenizer = tokenizer
        self._max_length = min(max_length, tokenizer.model_max_length)
        self._is_wordpiece = type(tokenizer.backend_tokenizer.model).__name__ == "WordPiece"

    def encode(self, texts: Sequence[Text]) -> tuple[dict[str, Tensor], list[TokenizedText]]:
        """Inputs of the model, padded on the right to the longest text, and their tokens."""
        seconds = None if texts[0].second is None else [text.second for text in texts]
        encoded = self._tokenizer(
            [text.first for text in texts],
            seconds,
            truncation=True,
            max_length=self._max_length,
            padding=True,
            padding_side="right",
            return_tensors="pt",
        )
        tokenized = [
            self._tokenized(text, encoding)
            for text, encoding in zip(texts, encoded.encodings, strict=True)
        ]
        return dict(encoded), tokenized

    def _tokenized(self, text: Text, encoding: Encoding) -> TokenizedText:
        spans = _spans(text, encoding)
        whole = spans
        if encoding.overflowing:
            uncut = self._tokenizer(text.first, text.second, truncation=False, verbose=False)
            whole = _spans(text, uncut.encodings[0])
        pieces = [
            self._wordpiece(token) if is_read else None
            for token, is_read in zip(encoding.tokens, encoding.attention_mask, strict=True)
        ]
        return TokenizedText(spans, pieces, [span for span in whole if span is not None])

    def _wordpiece(self, token: str) -> str:
        """In other vocabularies the start of a word is marked, in WordPiece its continuation."""
        if self._is_wordpiece:
            return token
        return token[1:] if token.startswith(_WORD_STARTS) else f"##{token}"


def span_rows(
    text: Text, teacher: TokenizedText, student: TokenizedText, *, whole_words: bool
) -> list[Row]:
    """Tokens that cover the same run of characters.

    A run ends where no token of either side, and with `whole_words` no word, reaches over its end.
    One that lacks a token on either side, by truncation or because a tokenizer drops its
    characters, is no row.
    """
    starts = _merged_starts(
        [*teacher.content, *student.content, *(text.words if whole_words else ())]
    )
    run_of = lambda span: bisect_right(starts, span[0]) - 1
    sides = [_by_run(tokens, run_of, len(starts)) for tokens in (teacher, student)]
    return [
        (theirs, mine)
        for (theirs, needed_t), (mine, needed_s) in zip(*sides, strict=True)
        if len(theirs) == needed_t > 0 and len(mine) == needed_s > 0
    ]


def position_rows(teacher: TokenizedText, student: TokenizedText) -> list[Row]:
    """Positions at which both sides have the same piece, special tokens included."""
    return [
        ([i], [i])
        for i, (theirs, mine) in enumerate(zip(teacher.pieces, student.pieces, strict=False))
        if mine is not None and theirs == mine
    ]


def _spans(text: Text, encoding: Encoding) -> list[Span | None]:
    """Characters of each token, without white space; bare white space is where the next word is."""
    spans: list[Span | None] = []
    for sequence, (start, end) in zip(encoding.sequence_ids, encoding.offsets, strict=True):
        if sequence is None:
            spans.append(None)
            continue
        read, base = text.first, 0
        if sequence == 1 and text.second is not None:
            read, base = text.second, len(text.first) + 1
        end = max(start + len(read[start:end].rstrip()), start)
        start = len(read) - len(read[start:].lstrip())
        # the mark of a word's start, as SentencePiece's, is a token of the word also on its own
        end = max(end, min(start + 1, len(read)))
        spans.append((base + start, base + end) if start < end else None)
    return spans


def _runs(text: str) -> list[Span]:
    """Runs of characters that are not white space."""
    return [match.span() for match in re.finditer(r"\S+", text)]


def _merged_starts(spans: Sequence[Span]) -> list[int]:
    """First characters of the runs that overlapping spans form, in order."""
    starts: list[int] = []
    reach = -1
    for start, end in sorted(spans):
        if start >= reach:
            starts.append(start)
        reach = max(reach, end)
    return starts


def _by_run(
    tokens: TokenizedText, run_of: Callable[[Span], int], num_runs: int
) -> list[tuple[list[int], int]]:
    """Positions of each run's tokens, and how many the run has before truncation."""
    positions: list[list[int]] = [[] for _ in range(num_runs)]
    needed = [0] * num_runs
    for position, span in enumerate(tokens.spans):
        if span is not None:
            positions[run_of(span)].append(position)
    for span in tokens.content:
        needed[run_of(span)] += 1
    return list(zip(positions, needed, strict=True))

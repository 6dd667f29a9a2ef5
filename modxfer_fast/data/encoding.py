"""Documents -> pieces of at most `max_length` tokens, each token marked as target or context.

A piece is `{"input_ids": [n], "is_target": [n], "problem", "row", "is_cut"}`; `is_target[i]`: token
i is to be predicted. A document that cannot be learnt from leaves one piece without tokens that
says why (`problem`) and where it came from (`row`, counted from 1, 0 where not known). `is_cut`:
the document had further targets behind the piece. Facts of the document (facts.py) are beside them,
and where the teacher reads a prompt of its own `{"teacher_input_ids", "teacher_is_target"}`, which
has the same targets in the same order.
"""

from collections.abc import Callable, Iterator
from typing import Any

from transformers import PreTrainedTokenizerBase

from modxfer_fast.data.chat import ChatEncoder
from modxfer_fast.data.facts import FACTS, OF_TEACHER, TEACHER_PROMPT
from modxfer_fast.data.packing import Columns
from modxfer_fast.data.records import Completion, Conversation, RecordError, Text, normalise

ROW = "__row__"  # column with the number of a document in its source
PIECE = ("input_ids", "is_target", "problem", "row", "is_cut")

Encoded = tuple[list[int], list[bool]]  # ids, and which are targets


def tokenise_documents(
    fmt: str, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Callable[[Columns], Columns]:
    """A function for `Dataset.map(batched=True)`: documents of format `fmt` -> pieces."""
    chats = None  # only once there is one: a tokenizer for other formats needs no template

    def encode(document, ids_of_text) -> Iterator[tuple[Any, ...]]:
        if isinstance(document, RecordError):
            raise document
        if isinstance(document, Text):
            yield from _pieces(_ended(next(ids_of_text), tokenizer), max_length)
        elif document.for_teacher is None:
            yield _cut(*encode_answered(document), max_length)
        else:
            yield _cut_both(
                encode_answered(document), encode_answered(document.for_teacher), max_length
            )

    def encode_answered(document: Completion | Conversation) -> Encoded:
        nonlocal chats
        if isinstance(document, Completion):
            return _completion(document, tokenizer)
        chats = chats or ChatEncoder(tokenizer)
        return chats.encode(document)

    def encode_batch(rows: Columns) -> Columns:
        documents = [
            _normalised(dict(zip(rows, values, strict=True)), fmt)
            for values in zip(*rows.values(), strict=True)
        ]
        texts = [document.text for document in documents if isinstance(document, Text)]
        ids_of_text = iter(tokenizer(texts, verbose=False)["input_ids"] if texts else ())
        numbers = rows.get(ROW, [0] * len(documents))
        facts = [fact for fact in FACTS if fact in rows]
        of_teacher = OF_TEACHER if TEACHER_PROMPT in rows else ()
        pieces = []
        for i, (document, row) in enumerate(zip(documents, numbers, strict=True)):
            own = [rows[fact][i] for fact in facts]
            try:
                encoded = list(encode(document, ids_of_text))
                pieces += [
                    (ids, mask, "", row, is_cut, *theirs, *own)
                    for ids, mask, is_cut, *theirs in encoded
                ]
            except RecordError as error:
                nothing: list[Any] = [[] for _ in of_teacher]
                pieces.append(([], [], str(error), row, False, *nothing, *own))
        names = (*PIECE, *of_teacher, *facts)
        return {name: [p[i] for p in pieces] for i, name in enumerate(names)}

    return encode_batch


def tokenise_texts(
    tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Callable[[Columns], Columns]:
    """A function for `Dataset.map(batched=True)`: texts -> rows of an encoder.

    A row is `{"input_ids", "length"}` of at most `max_length` tokens, with the tokenizer's special
    tokens around each; a longer text becomes several rows, an empty one none.
    """

    def encode_batch(rows: Columns) -> Columns:
        texts = [text for text in rows["text"] if isinstance(text, str) and text.strip()]
        if not texts:
            return {"input_ids": [], "length": []}
        encoded = tokenizer(
            texts,
            truncation=True,
            max_length=max_length,
            return_overflowing_tokens=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return {"input_ids": encoded["input_ids"], "length": list(map(len, encoded["input_ids"]))}

    return encode_batch


def _normalised(record: dict, fmt: str) -> Text | Completion | Conversation | RecordError:
    try:
        return normalise(record, fmt)
    except RecordError as error:
        return error


def _pieces(ids: list[int], max_length: int) -> Iterator[tuple[list[int], list[bool], bool]]:
    # pieces of one document share one token, so that each token but the first is a target once
    for start in range(0, max(len(ids) - 1, 1), max_length - 1):
        piece = ids[start : start + max_length]
        yield piece, [True] * len(piece), False


def _completion(document: Completion, tokenizer) -> tuple[list[int], list[bool]]:
    # encoded apart: the border between context and target is then a border between tokens
    head = tokenizer(document.prompt, verbose=False)["input_ids"]
    if head and head[-1] == tokenizer.eos_token_id and document.prompt:
        # what the tokenizer puts behind a text goes, what is written in it stays
        written = tokenizer(document.prompt, add_special_tokens=False, verbose=False)["input_ids"]
        if head[-len(written) :] != written:
            head = head[:-1]
    tail = tokenizer(document.completion, add_special_tokens=False, verbose=False)["input_ids"]
    ids = _ended(head + tail, tokenizer)
    return ids, [False] * len(head) + [True] * (len(ids) - len(head))


def _cut(ids: list[int], mask: list[bool], max_length: int) -> tuple[list[int], list[bool], bool]:
    """The first `max_length` tokens, and whether targets were lost behind them."""
    kept = mask[:max_length]
    if not any(kept[1:]):  # the first token of a document is no target
        if any(mask[1:]):
            raise RecordError(f"nothing to learn within max_length={max_length} tokens")
        raise RecordError("nothing to learn: no token of the assistant's or of the completion")
    return ids[:max_length], kept, any(mask[max_length:])


def _cut_both(
    own: Encoded, theirs: Encoded, max_length: int
) -> tuple[list[int], list[bool], bool, list[int], list[bool]]:
    """`_cut` of what student and teacher read, behind the same target."""
    (ids, mask), (teacher_ids, teacher_mask) = own, theirs
    places = [i for i, target in enumerate(mask) if target]
    teacher_places = [i for i, target in enumerate(teacher_mask) if target]
    if [ids[i] for i in places] != [teacher_ids[i] for i in teacher_places]:
        raise RecordError(
            "column of data.teacher_prompt: expected the tokens of the completion behind it, "
            "got others"
        )
    # the first token of a document is no target
    pairs = [(i, j) for i, j in zip(places, teacher_places, strict=True) if i and j]
    kept = [(i, j) for i, j in pairs if i < max_length and j < max_length]
    if not kept:
        raise RecordError(f"nothing to learn within max_length={max_length} tokens")

    def cut(ids: list[int], targets: list[int]) -> Encoded:
        known = set(targets)
        return ids[: targets[-1] + 1], [i in known for i in range(targets[-1] + 1)]

    (ids, mask), (teacher_ids, teacher_mask) = (
        cut(*each)
        for each in zip((ids, teacher_ids), map(list, zip(*kept, strict=True)), strict=True)
    )
    return ids, mask, len(kept) < len(pairs), teacher_ids, teacher_mask


def _ended(ids: list[int], tokenizer) -> list[int]:
    end = tokenizer.eos_token_id
    return ids if ids and ids[-1] == end else [*ids, end]

"""What the kinds that read plain text share: their inputs, their tokens, their vocabulary."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from modxfer_fast.engine.batch import Batch, TokenSet


def read_tokens(
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    token_mask: Tensor | None = None,
    num_tokens: int | None = None,
    num_tokens_in_batch: Tensor | int | None = None,
) -> Batch:
    """The inputs of a text model, each [B, T], and which of its tokens count.

    Args:
        attention_mask: says where padding is when `position_ids` is not given.
        position_ids: restarting at every packed document.
        token_mask: bool, the tokens that hidden states and relations are compared on. Without it
            those of `attention_mask`, or all.
        num_tokens: number of those tokens, known on the host.
    """
    present: Tensor | int = 0 if num_tokens is None else num_tokens
    if attention_mask is None:
        present = input_ids.numel()
    elif num_tokens is None:
        present = attention_mask.sum()
    if token_mask is None:
        if attention_mask is None:
            num_tokens = input_ids.numel()
        else:
            token_mask = attention_mask.bool()
    return Batch(
        {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids},
        tokens=TokenSet(token_mask, num_tokens, num_tokens_in_batch),
        num_tokens=present,
    )


def count_tokens(batch: Mapping[str, Any]) -> dict[str, Tensor | int]:
    """{"tokens": those of a collator's batch that are no padding}."""
    num_tokens, mask = batch.get("num_tokens"), batch.get("attention_mask")
    if num_tokens is None:
        num_tokens = batch["input_ids"].numel() if mask is None else mask.sum()
    return {"tokens": num_tokens}


def common_rows(ours: int, teacher, what: str) -> int:
    """Leading rows of the vocabularies that student and teacher both have.

    Raises:
        ValueError: they differ in size, and are not known to hold every token.
    """
    theirs, num_tokens = teacher.classes, teacher.num_tokens
    common = min(ours, theirs)
    if ours == theirs or (num_tokens is not None and common >= num_tokens):
        return common
    if num_tokens is None:
        raise ValueError(
            f"teacher: expected the student's {ours} {what}, got {theirs}; where both are "
            "padded for one tokenizer, give it as processing_class"
        )
    role = "student" if ours < theirs else "teacher"
    raise ValueError(f"{role}: expected at least {num_tokens} {what}, one per token, got {common}")

"""Labels of any collator, aligned with the positions that predict them.

Collators of transformers and TRL emit labels[t] = input_ids[t], and their models shift them; the
fused loss wants labels[t] = the token after position t. Which of the two a batch holds is told,
never guessed: by `labels_are_aligned = True` on the collator, or by the name `shift_labels` in the
batch, which is transformers' name for aligned labels. Values are looked at to catch a wrong claim.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from modxfer_fast.data.collator import IGNORE_INDEX, VARLEN

_CLAIM = "labels_are_aligned"
_INPUTS = ("input_ids", "attention_mask", "position_ids")
# What else collators emit: boundaries that position_ids tell as well, and what no decoder reads,
# such as the prompts apart that TRL's trainers of students who write go on from.
_BOUNDARIES = (*VARLEN, "seq_idx")
_UNREAD = (
    *("token_type_ids", "special_tokens_mask", "length", "num_input_tokens_seen"),
    *("prompts", "prompt_attention_mask", "byte_offsets"),
    *("original_prompt_text", "original_completion_text"),
)
# Of a batch whose claim is wrong nearly every label betrays it; of a right one a repeated token may
_NEARLY_ALL = 0.95


class AlignedLabels:
    """A collator whose batches have aligned labels and, on the host, their number.

    Args:
        collator: any. Batches of one with `labels_are_aligned = True` pass as they are; others hold
            labels [B, T] beside input_ids [B, T], or aligned ones as `shift_labels`. Labels do not
            cross into another document of a packed row, which is where position_ids stop rising.
    """

    labels_are_aligned = True

    def __init__(self, collator: Callable[[list], dict[str, Any]]):
        self.collator = collator
        self._is_aligned = bool(getattr(collator, _CLAIM, False))

    def __call__(self, features: list) -> dict[str, Any]:
        """The batch of the inner collator, as `DistillModule.forward` takes it.

        Where there are not as many rows as `features`, as when documents lie end to end in one row,
        the int "num_samples" tells how many these are; it is for the trainer alone.

        Raises:
            ValueError: labels that are not what the collator says, or a batch that the engine
                cannot read, with the key.
        """
        batch = self.collator(features)
        if "labels" not in batch and "shift_labels" not in batch:
            raise ValueError(
                f"data_collator: expected labels in its batches, got {', '.join(batch)}"
            )
        if self._is_aligned:
            _check_aligned(batch["input_ids"], batch["labels"], "the collator says")
            return _with_num_samples(batch, len(features))
        _check_keys(batch)
        input_ids, mask = batch["input_ids"], batch.get("attention_mask")
        positions = batch.get("position_ids")
        if "shift_labels" in batch:
            labels = batch["shift_labels"]
            _check_aligned(input_ids, labels, "the name shift_labels says")
        else:
            labels = shifted(batch["labels"], mask, positions)
            _check_unshifted(input_ids, batch["labels"])
        if positions is not None and mask is not None and (mask[:, 1:] > mask[:, :-1]).any():
            raise ValueError(
                "data_collator: expected padding on the right of rows with position_ids, got some "
                "on the left; set padding_side='right' on the tokenizer"
            )
        aligned = {key: batch[key] for key in (*_INPUTS, *VARLEN) if batch.get(key) is not None}
        present = input_ids.numel() if mask is None else mask.sum()
        aligned |= {
            "labels": labels,
            "num_valid": int((labels != IGNORE_INDEX).sum()),
            "num_tokens": int(present),
        }
        return _with_num_samples(aligned, len(features))


def sample_start(position_ids: Tensor | None, sample: int, num_samples: int) -> int:
    """Where a sample begins in a row [1, T] of `num_samples`, each of them one document.

    Raises:
        ValueError: positions that do not tell it.
    """
    starts = None
    if position_ids is not None and position_ids.shape[0] == 1:
        restarts = position_ids[0, 1:] <= position_ids[0, :-1]
        starts = [0, *(restarts.nonzero().flatten() + 1).tolist()]
    if starts is None or len(starts) != num_samples:
        got = "none" if position_ids is None else f"some of shape {tuple(position_ids.shape)}"
        restarting = "" if starts is None else f" that begin {len(starts)} times"
        raise ValueError(
            "data_collator: expected a row for each sample, or one row of all whose position_ids "
            f"begin anew at each of the {num_samples}, got {got}{restarting}: which samples ranks "
            "repeat cannot be told, so evaluate in one process, or a set that the batches of all "
            "ranks divide"
        )
    return starts[sample]


def _with_num_samples(batch: dict[str, Any], num_samples: int) -> dict[str, Any]:
    if batch["input_ids"].shape[0] == num_samples:
        return batch
    return {**batch, "num_samples": num_samples}


def shifted(labels: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None) -> Tensor:
    """[B, T] labels of the tokens themselves -> of the positions before them; -100 where none.

    A position that is padding predicts nothing, nor does the last one of a document.
    """
    aligned = torch.full_like(labels, IGNORE_INDEX)
    aligned[:, :-1] = labels[:, 1:]
    if position_ids is not None:
        restarts = position_ids[:, 1:] <= position_ids[:, :-1]
        aligned[:, :-1].masked_fill_(restarts, IGNORE_INDEX)
    if attention_mask is not None:
        aligned.masked_fill_(attention_mask == 0, IGNORE_INDEX)
    return aligned


def _check_keys(batch: dict[str, Any]) -> None:
    if "num_valid" in batch:  # a key of ours alone, which counts aligned labels
        raise ValueError(
            f"data_collator: expected {_CLAIM} = True on a collator that emits num_valid, which "
            "counts labels of the token after each position; leave num_valid out if labels[t] is "
            "the token at t"
        )
    for key, value in batch.items():
        if key in (*_INPUTS, "labels", "shift_labels"):
            if value is not None and value.dim() != 2:
                raise ValueError(
                    f"data_collator: expected {key} of shape [B, T], got {tuple(value.shape)}"
                )
        elif key in _BOUNDARIES:
            if batch.get("position_ids") is None:
                raise ValueError(
                    f"data_collator: expected position_ids beside {key}, which say where documents "
                    "of a packed row begin"
                )
        elif key not in _UNREAD:
            raise ValueError(
                "data_collator: expected input_ids, labels, attention_mask and position_ids, "
                f"got {key} too, which the engine hands to no model"
            )


def _agreement(input_ids: Tensor, labels: Tensor) -> tuple[float, float]:
    """Shares of the labels that are the token at their own position, and the one after it.

    Those of the last position are left out: a collator may have cut the token after it off.
    """
    ids, following, labels = input_ids[:, :-1], input_ids[:, 1:], labels[:, :-1]
    valid = labels != IGNORE_INDEX
    count = max(int(valid.sum()), 1)
    own, after = (int(((labels == tokens) & valid).sum()) / count for tokens in (ids, following))
    return own, after


def _check_aligned(input_ids: Tensor, labels: Tensor, who: str) -> None:
    here, after = _agreement(input_ids, labels)
    if here >= _NEARLY_ALL and after < here:
        raise ValueError(
            f"data_collator: expected labels[t] to be the token after position t, as {who}, got "
            f"labels that are input_ids for {here:.0%} of a batch: a student would learn to copy "
            f"its input; leave {_CLAIM} out, and they are shifted"
        )


def _check_unshifted(input_ids: Tensor, labels: Tensor) -> None:
    here, after = _agreement(input_ids, labels)
    if after >= _NEARLY_ALL and here < after:
        raise ValueError(
            "data_collator: expected labels[t] to be the token at position t, as collators of "
            f"transformers emit them, got labels that are the next token for {after:.0%} of a "
            f"batch; set {_CLAIM} = True on the collator, and they are not shifted again"
        )

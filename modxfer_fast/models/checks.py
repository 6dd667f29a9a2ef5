"""Checks that teacher, student, tokenizer and packing fit together, before any training."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from modxfer_fast.errors import ModelError
from modxfer_fast.kernels.common.gathered import full_tensor
from modxfer_fast.models.architecture import max_tokens


def is_deepspeed_hook(hook: Any) -> bool:
    """Whether a hook of a module is one of DeepSpeed's, which gather and give up parameters."""
    return (getattr(hook, "__module__", None) or "").startswith("deepspeed.")


def is_partitioned(parameter: Tensor) -> bool:
    """Whether ZeRO-3 keeps only a slice of the parameter on this rank."""
    return hasattr(parameter, "ds_id")


def true_shape(param: Any) -> tuple[int, ...]:
    """The shape of the whole parameter, also where this rank holds a slice."""
    return tuple(param.ds_shape if is_partitioned(param) else param.shape)


def num_elements(model: nn.Module, *, only_trainable: bool = False) -> int:
    """Of all parameters, each once, whole."""
    counted = [p for p in model.parameters() if p.requires_grad or not only_trainable]
    return sum(math.prod(true_shape(param)) for param in counted)


def has_values(tensor: Tensor) -> bool:
    """Whether there is memory behind a tensor; a planned one has a shape alone."""
    return not (tensor.is_meta or is_fake(tensor))


def check_same_tokenizer(
    ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase, role: str
) -> None:
    """Raise unless the job's tokenizer and that of the model of `role` give every token one id."""
    expected, got = ours.get_vocab(), theirs.get_vocab()
    if expected == got:
        return
    differing = [t for t in expected.keys() | got.keys() if got.get(t) != expected.get(t)]
    token = min(differing)
    raise ModelError(
        f"{role}: its tokenizer differs from the job's; expected the same id for each of "
        f"{len(expected)} tokens, got {len(got)} tokens of which {len(differing)} differ, e.g. "
        f"{token!r} is {got.get(token, 'absent')} instead of {expected.get(token, 'absent')}"
    )


def check_config_fits(
    config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, max_length: int, role: str
) -> None:
    """Raise unless a model of this configuration has a place for every token and position.

    Vocabularies of teacher and student may be padded to different sizes.
    """
    config = config.get_text_config()
    if getattr(config, "vocab_size", None) is not None:
        _check_rows(config.vocab_size, tokenizer, role)
    limit = max_tokens(config)
    if limit is not None and max_length > limit:
        raise ModelError(
            f"{role}: expected data.max_length of at most {limit}, the positions that the model "
            f"has, got {max_length}"
        )


def check_rows_fit(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int, role: str
) -> None:
    """Raise unless a model has a row for every token, and for every position of a row of data."""
    for table in (model.get_input_embeddings(), model.get_output_embeddings()):
        if table is not None:
            _check_rows(true_shape(table.weight)[0], tokenizer, role)
    check_config_fits(model.config, tokenizer, max_length, role)


def _check_rows(rows: int, tokenizer: PreTrainedTokenizerBase, role: str) -> None:
    if rows < len(tokenizer):
        raise ModelError(
            f"{role}: expected a vocabulary of at least {len(tokenizer)} rows, one per token, "
            f"got {rows}"
        )


@torch.no_grad()
def nonfinite_parameters(model: nn.Module) -> list[str]:
    """Names of the parameters with a NaN or an infinity."""
    return [name for name, param in model.named_parameters() if not _is_finite(param)]


def _is_finite(param: Any) -> bool:
    return bool(full_tensor(param.isfinite().all()))


def listed(names: list[str]) -> str:
    """The first few of many names."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def check_finite(model: nn.Module, role: str) -> None:
    """Raise when a weight is not finite."""
    refuse_nonfinite(nonfinite_parameters(model), role)


def refuse_nonfinite(names: list[str], role: str) -> None:
    """Raise when there are names of weights that are not finite."""
    if names:
        raise ModelError(
            f"{role}: expected weights that are finite, got NaN or inf in {listed(names)}; the "
            "checkpoint is damaged, or was converted to a dtype too narrow for it"
        )


@torch.no_grad()
def check_packing(model: PreTrainedModel, role: str) -> None:
    """Raise when a document packed behind another one sees it.

    transformers builds the mask from restarting position_ids in most architectures but not in all,
    and silently attends across documents in the others; so the model itself is asked.
    """
    length = 4
    ids = torch.arange(3, 3 + 2 * length, device=model.device).remainder(model.config.vocab_size)
    positions = torch.arange(length, device=model.device)
    was_training = model.training
    model.eval()
    packed = model(
        input_ids=ids[None], position_ids=positions.repeat(2)[None], use_cache=False
    ).logits[0, length:]
    alone = model(
        input_ids=ids[None, length:], position_ids=positions[None], use_cache=False
    ).logits[0]
    model.train(was_training)
    if not alone.isfinite().all():
        check_finite(model, role)
        raise ModelError(
            f"{role}: expected logits that are finite, got NaN or inf though its weights are "
            "finite; a half-precision model may need bfloat16 or float32"
        )
    # a leak moves logits by their own size, another summation order by rounding
    tolerance = 16 * torch.finfo(alone.dtype).eps * alone.abs().max()
    if not torch.allclose(packed, alone, rtol=0, atol=float(tolerance)):
        raise ModelError(
            f"{role}: a {model.config.model_type} model lets packed documents see one another; "
            "set data.packing: false"
        )

"""Completions by transformers' `generate`, in this process."""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from modxfer_fast.config import OnPolicySection
from modxfer_fast.engine import deepspeed
from modxfer_fast.engine.on_policy.rollouts import Sampling, Tokens
from modxfer_fast.engine.progress import here
from modxfer_fast.models.architecture import max_tokens, without_peft


def sampling_of(
    section: OnPolicySection, student: nn.Module, tokenizer: Any, num_classes: int | None
) -> Sampling:
    """How `section` has completions drawn.

    Args:
        tokenizer: or None; its end of a text, and those of the student's generation_config, end a
            completion.
        num_classes: that may be drawn.

    Raises:
        ValueError: neither the section nor the student's configuration limits the length.
    """
    base = without_peft(student)
    length = section.max_length or max_tokens(base.config.get_text_config())
    if length is None:
        raise ValueError(
            "on_policy.max_length: expected a number, because the student has no limit"
        )
    return Sampling(
        section.max_new_tokens,
        length,
        section.temperature,
        section.top_p,
        section.top_k,
        stop_tokens(base, tokenizer),
        num_classes,
    )


def stop_tokens(base: PreTrainedModel, tokenizer: Any) -> tuple[int, ...]:
    """Ids that end a text, of a tokenizer or None and of the model."""
    ends = base.generation_config.eos_token_id if base.generation_config is not None else None
    ends = ends if isinstance(ends, list) else [ends]
    ends = [*ends, getattr(tokenizer, "eos_token_id", None)]
    return tuple(sorted({end for end in ends if end is not None}))


class StudentRollouts:
    """Completions by the student itself, in eval mode, its adapters active.

    Parameters that ZeRO-3 or FSDP2 divides are gathered once for a call; ranks then do not wait for
    one another while they generate.

    Args:
        student: PreTrainedModel or PeftModel.
        autocast: opens the context that the student computes in.
        batch_size: prompts completed at once; None for all.
        whole: opens the context in which the student is whole; None does under ZeRO.
    """

    def __init__(
        self,
        student: nn.Module,
        autocast: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
        batch_size: int | None = None,
        whole: Callable[[], contextlib.AbstractContextManager] | None = None,
    ):
        self.student, self.autocast, self.batch_size = student, autocast, batch_size
        self.whole = whole or partial(deepspeed.whole, student)

    def generate(
        self, prompts: list[Tokens], sampling: Sampling, *, seed: int, step: int
    ) -> list[Tokens]:
        size = self.batch_size or max(len(prompts), 1)
        device = next(self.student.parameters()).device
        completions: list[Tokens] = []
        with (
            in_eval_mode(self.student),
            self.whole(),
            _seeded(seed, device),
            self.autocast(),
        ):
            for start in range(0, len(prompts), size):
                completions += complete(self.student, prompts[start : start + size], sampling)
        return completions


@torch.no_grad()
def complete(
    model: nn.Module, prompts: list[Tokens], sampling: Sampling, *, synced: bool = False
) -> list[Tokens]:
    """Completions of one batch of prompts, by a model in eval mode whose parameters are whole.

    Args:
        synced: every rank calls the model equally often, as parameters that are gathered when a
            module is called require.
    """
    base = without_peft(model)
    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    device = next(base.parameters()).device
    rooms = [sampling.room(prompt) for prompt in prompts]
    full = _Full(torch.tensor(rooms, device=device) + width)
    with _plain_generation(base, sampling):
        rows = base.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            generation_config=_config(base, sampling, max(rooms)),
            stopping_criteria=StoppingCriteriaList([full]),
            synced_gpus=synced,
        )
    written = rows[:, width:].tolist()
    return [sampling.cut(*pair) for pair in zip(prompts, written, strict=True)]


def _config(base: PreTrainedModel, sampling: Sampling, max_new_tokens: int) -> GenerationConfig:
    classes, allowed = base.config.get_text_config().vocab_size, sampling.num_classes
    options = {}
    if sampling.temperature:
        options = {name: getattr(sampling, name) for name in ("temperature", "top_p", "top_k")}
    if allowed is not None and allowed < classes:
        options["suppress_tokens"] = list(range(allowed, classes))
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=sampling.temperature > 0,
        eos_token_id=list(sampling.stop) or None,
        pad_token_id=0,  # of what is cut off
        use_cache=True,
        **options,
    )


@contextlib.contextmanager
def _plain_generation(base: PreTrainedModel, sampling: Sampling) -> Iterator[None]:
    """Inside, the habits of the model's own generation_config, a repetition penalty for one, are
    off: what it writes is drawn from the distribution that the loss sees."""

    def clamp(module, args, kwargs):
        # of rows that are full while others go on: a table of positions may end there
        positions = kwargs.get("position_ids")
        if positions is not None:
            kwargs["position_ids"] = positions.clamp(max=sampling.max_length - 1)
        return args, kwargs

    hook = base.register_forward_pre_hook(clamp, with_kwargs=True)
    habits, base.generation_config = base.generation_config, GenerationConfig()
    try:
        yield
    finally:
        base.generation_config = habits
        hook.remove()


class _Full(StoppingCriteria):
    """Ends a row that has no room left."""

    def __init__(self, lengths: Tensor):
        self.lengths = lengths

    def __call__(self, input_ids: Tensor, scores, **kwargs) -> Tensor:
        here.move()  # once a token
        return self.lengths <= input_ids.shape[1]


@contextlib.contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Without dropout, and so without gradient checkpointing, which would do without a cache."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Draws of the block depend on `seed`, those after it do not notice the block."""
    devices = [] if device.type == "cpu" else [device]
    kind = "cuda" if device.type == "cpu" else device.type
    with torch.random.fork_rng(devices, device_type=kind):
        torch.manual_seed(seed)
        yield

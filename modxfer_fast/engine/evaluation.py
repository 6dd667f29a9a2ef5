"""Evaluation: what a module's terms come to over a whole set, in which each sample counts once."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.state import GradientState
from accelerate.utils import gather_object
from torch import nn

from modxfer_fast.data.collator import IGNORE_INDEX
from modxfer_fast.engine import deepspeed, fsdp
from modxfer_fast.engine.config import DistillConfig
from modxfer_fast.engine.guard import NonFiniteError
from modxfer_fast.engine.labels import sample_start
from modxfer_fast.engine.metrics import means
from modxfer_fast.engine.module import DistillModule
from modxfer_fast.engine.students import student_of_kind
from modxfer_fast.engine.teachers.several import COUNTS


@contextlib.contextmanager
def evaluating(
    module: DistillModule, engine: nn.Module | None, device: torch.device
) -> Iterator[nn.Module]:
    """What to call for evaluation; `module.meter` is a fresh one meanwhile.

    Args:
        engine: DeepSpeed's around `module`; None before training, and without DeepSpeed.
    """
    training_meter, was_training = module.meter, module.training
    module.meter = module.new_meter(evaluation=True)
    module.eval()
    try:
        if engine is not None:
            yield engine
        elif fsdp.is_sharded(module):
            yield module
            fsdp.reshard(module)
        else:
            module.to(device)
            with deepspeed.gathered_on_call(module), module.gathered_head():
                yield module
    finally:
        module.meter = training_meter
        module.train(was_training)


def without_repeated_samples(
    inputs: dict[str, Any], args: DistillConfig, state: GradientState, has_features: bool
) -> dict[str, Any]:
    """A batch without labels and tokens of samples that the sampler repeats for equal batches.

    Raises:
        ValueError: which samples are repeated cannot be told, on all ranks.
    """
    inputs = dict(inputs)
    num_rows = inputs["input_ids"].shape[0]
    num_samples = inputs.pop("num_samples", num_rows)
    if args.world_size == 1 or not state.end_of_dataloader or state.remainder <= 0:
        return inputs
    if not student_of_kind(args.kind).has_vocabulary:  # on all ranks, also where none is repeated
        raise ValueError(
            "eval_dataset: expected one that the batches of all ranks divide, because rows of "
            "classifiers cannot be left out; or evaluate in one process"
        )
    # of the last batches of all ranks, laid end to end, the first `remainder` samples are new
    num_new = max(state.remainder - args.process_index * args.eval_batch_size, 0)
    repeated: Any = slice(num_new, None)
    unclear = None
    if num_samples != num_rows and 0 < num_new < num_samples:
        try:
            start = sample_start(inputs.get("position_ids"), num_new, num_samples)
            repeated = slice(None), slice(start, None)
        except ValueError as error:
            unclear = error
    # a rank that goes on alone would wait for the others in its next collective call
    for refusal in gather_object([unclear]):
        if refusal is not None:
            raise refusal
    if num_new >= num_samples:
        return inputs
    if "labels" in inputs:
        labels = inputs["labels"].clone()
        labels[repeated] = IGNORE_INDEX
        inputs |= {"labels": labels, "num_valid": None, COUNTS: None}
    if has_features:
        mask = inputs.get("attention_mask")
        mask = torch.ones_like(inputs["input_ids"]) if mask is None else mask.clone()
        mask[repeated] = 0
        inputs |= {"token_mask": mask.bool(), "num_tokens": None}
    return inputs


def evaluation_metrics(module: DistillModule, sums: dict[str, float]) -> dict[str, float]:
    """{"loss", "kd", "ce", "perplexity", and the terms inside the networks}, as far as there.

    Args:
        sums: over all ranks, of the meter that evaluation had.

    Raises:
        NonFiniteError: the teacher's answers are not finite. ValueError: nothing counted.
    """
    if sums["nonfinite_teacher"]:
        raise NonFiniteError(
            "teacher: expected hidden states that are finite, got NaN or inf in "
            f"{sums['nonfinite_teacher']:.0f} batches of the evaluation though its weights are "
            "finite; a half-precision teacher may need bfloat16 or float32"
        )
    objective, values = module.objective, means(sums)
    if sums["nonfinite"]:
        values = {name: math.nan for name in sums if f"num_{name}" in sums}
    elif objective is None and not sums["num_tokens"]:
        raise ValueError("eval_dataset: expected at least one token, got none")
    elif objective is not None and not (sums["num_kd"] or sums["num_ce"]):
        raise ValueError("eval_dataset: expected at least one label other than -100, got none")
    logits: dict[str, float] = {name: values.pop(name) for name in ("kd", "ce") if name in values}
    loss = sum(value for name, value in values.items() if name.endswith("_loss"))
    if objective is not None:
        loss += objective.combine(logits.get("kd", 0.0), logits.get("ce", 0.0))
    if module.teacher is None:
        logits.pop("kd", None)
    if "ce" in logits and module.parts.has_vocabulary:
        logits["perplexity"] = math.exp(logits["ce"]) if not logits["ce"] > 700 else math.inf
    return {"loss": loss, **logits, **values}

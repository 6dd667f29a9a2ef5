"""What a student needs while it writes: keys and values, and a pass over its prompts."""

from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from modxfer_fast.config import OnPolicySection
from modxfer_fast.jobs.plan.memory import bytes_of
from modxfer_fast.measure.live import LiveBytes

_OF_SAMPLING = 4 * 4  # bytes of a class: logits, what is left of them, their softmax, its sums


class PlannedGeneration(NamedTuple):
    """Of what is written at once.

    Attributes:
        bytes: most that exists at once, beside the student's parameters.
        texts, tokens: how many there are, and of how many tokens, the prompt among them.
        moved: bytes that an optimiser step reads to write what it replaces, on average.
    """

    bytes: int
    texts: int
    tokens: int
    moved: float


@torch.no_grad()
def planned_generation(
    student: PreTrainedModel,
    section: OnPolicySection,
    rows: int,
    accumulation: int,
    length: int,
) -> PlannedGeneration:
    """All prompts of a step, each as long as the completion leaves room for.

    Args:
        student: without values; inside `without_values`.
        rows, accumulation: of a micro-batch, and micro-batches of a step.
        length: tokens of a prompt with its completion.
    """
    texts = min(section.batch_size or rows * accumulation, rows * accumulation)
    prompt = max(length - section.max_new_tokens, 1)
    was_training = student.training
    student.eval()
    reading = LiveBytes()
    with reading:
        written = student(
            input_ids=torch.zeros(texts, prompt, dtype=torch.int64),
            use_cache=True,
            logits_to_keep=1,
        )
    student.train(was_training)
    # the name before transformers 5.24
    cache = written["cache"] if "cache" in written else written["past_key_values"]
    layers = cache.layers
    of_prompts = sum(
        kept.nbytes for layer in layers for kept in vars(layer).values() if torch.is_tensor(kept)
    )
    cached = of_prompts * length // prompt
    classes = written.logits.shape[-1]
    # the keys of one layer at a time, or its values, are copied in front of another token's
    writing = cached + cached // (2 * len(layers)) + _OF_SAMPLING * texts * classes
    # each token reads the weights once for all texts, and what its own text has cached so far
    calls = 1 - (1 - section.fraction) ** accumulation  # of steps that replace anything
    prompts = section.fraction * accumulation * rows
    if section.batch_size:
        calls = max(calls, prompts / texts)
    so_far = cached / texts * (prompt + length) / (2 * length)
    moved = section.max_new_tokens * (calls * bytes_of(student) + prompts * so_far) / section.reuse
    return PlannedGeneration(max(reading.peak, writing), texts, length, moved)

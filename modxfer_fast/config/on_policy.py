"""The `on_policy` section: training on what the student itself writes."""

from typing import Annotated

from pydantic import Field

from modxfer_fast.config.section import Positive, PositiveInt, Section


class OnPolicySection(Section):
    """On-policy distillation (GKD): completions that the student writes, judged by the teacher.

    A prompt is what precedes the last turn of the assistant, or the completion. Cross entropy
    counts on the texts of the data alone, the divergence on both.

    fraction: probability that a micro-batch is replaced by completions of its prompts; TRL's lmbda.
    max_new_tokens: of a completion.
    temperature, top_p, top_k: of the sampling; top_k 0 keeps all classes.
    reuse: steps in a row that train on the same completions.
    prompt_length: tokens of a text that are its prompt, where all of it is learnt, as plain text.
    max_length: tokens of a prompt with its completion; null is `data.max_length`, in Python the
        positions of the student.
    batch_size: prompts completed at once; null is all those of a step.
    """

    fraction: Annotated[float, Field(ge=0, le=1)] = 0.5
    max_new_tokens: PositiveInt = 128
    temperature: Positive = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    reuse: PositiveInt = 1
    prompt_length: PositiveInt | None = None
    max_length: Annotated[int, Field(ge=2)] | None = None
    batch_size: PositiveInt | None = None

"""The `on_policy` section: training on what the student itself writes."""

from typing import Annotated, Any

from pydantic import Field, model_validator

from modxfer_fast.config.section import Positive, PositiveInt, Section
from modxfer_fast.config.server import REACHING, WAYS, ServerSection

# keys of a generator that say where it is and how it is reached, not what it writes
VLLM_WAYS = (*REACHING, "adapter_dir")


class VLLMSection(ServerSection):
    __doc__ = f"""A vLLM that writes the completions. It serves the base of the student, whose LoRA
    it is given anew as that changes.

    url: of the server, such as http://HOST:8000.
    model: the name that the base is served under.
    adapter_dir: where adapters are left for the server, which sees it under the same path; null is
        the folder of the checkpoints.
    sync_frequency: steps in a row for which one adapter writes; TRL's vllm_sync_frequency.
    {WAYS}
    """

    adapter_dir: str | None = None
    sync_frequency: PositiveInt = 1
    max_in_flight: PositiveInt = 64
    timeout_s: Positive = 600.0

    @property
    def identity(self) -> dict[str, Any]:
        """What the completions depend on."""
        return self.model_dump(exclude=set(VLLM_WAYS))


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
    vllm: a server that writes the completions; null has them written in the process, by
        transformers.
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
    vllm: VLLMSection | None = None

    @model_validator(mode="after")
    def _one_batching(self):
        if self.vllm is not None and self.batch_size is not None:
            raise ValueError(
                "batch_size: expected nothing beside vllm, which is asked for "
                f"vllm.max_in_flight prompts at a time, got {self.batch_size}"
            )
        return self

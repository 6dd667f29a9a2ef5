"""The models of a job without their weights: shapes, dtypes, and a step that runs on them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface

from modxfer_fast.config import JobConfig, ModelSection, StudentSection
from modxfer_fast.errors import UserError
from modxfer_fast.models import apply_peft, build_model, load_model_config, make_config

_ATTENTION = "modxfer_plan"  # torch's, as it runs where nothing is padded


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """Rows are full, and a causal kernel needs no mask; transformers makes one where it traces."""


AttentionInterface.register(_ATTENTION, sdpa_attention_forward)
AttentionMaskInterface.register(_ATTENTION, _no_mask)


class _Vocabulary:
    """Stands for a tokenizer that is not there yet: it has a size."""

    bos_token_id = eos_token_id = pad_token_id = None

    def __init__(self, size: int) -> None:
        self._size = size

    def __len__(self) -> int:
        return self._size


@contextmanager
def without_values() -> Iterator[None]:
    """Tensors made inside have a shape and no memory."""
    with FakeTensorMode():
        yield


def configurations(config: JobConfig) -> dict[str, PreTrainedConfig]:
    """Those of the teachers, by the paths of their sections, and of the "student". One whose
    network is the student's has none.

    Raises:
        UserError: a vocabulary that nothing tells before the tokenizer is loaded.
    """
    sections = {**config.teacher_sections, "student": config.student}
    found: dict[str, PreTrainedConfig] = {}
    for role, section in sections.items():
        if not section.is_student:
            first = next(iter(found.values()), None)
            found[role] = _configuration(section, role, config, first)
    return found


def _configuration(
    section: ModelSection, role: str, config: JobConfig, teacher: PreTrainedConfig | None
) -> PreTrainedConfig:
    if section.path is not None:
        return load_model_config(section.path, section)
    fields: dict[str, Any] = dict(section.config or {})
    inherited = None
    if isinstance(section, StudentSection) and section.from_teacher is not None:
        inherited = teacher
        if section.from_teacher.layers and teacher is not None:
            name = teacher.attribute_map.get("num_hidden_layers", "num_hidden_layers")
            fields.setdefault(name, len(section.from_teacher.layers))
    size = fields.get("vocab_size") or getattr(teacher, "vocab_size", None)
    if size is None and config.tokenizer is not None:
        size = config.tokenizer.vocab_size
    if size is None:
        raise UserError(
            f"{role}.config.vocab_size: expected a number, which only the tokenizer knows"
        )
    vocabulary: Any = _Vocabulary(size)
    return make_config(
        fields, vocabulary, f"{role}.config", vocab_size=size, kind=config.kind, inherited=inherited
    )


def model_without_values(
    config: PreTrainedConfig, section: ModelSection, kind: str, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """As it would be loaded; inside `without_values`.

    Args:
        dtype: None for that of the section, of its checkpoint, or fp32 of what is built.
    """
    if dtype is None and section.dtype is None and not section.is_built:
        dtype = config.dtype
    name: Any = section.dtype if dtype is None else str(dtype).removeprefix("torch.")
    planned = ModelSection(
        config={"model_type": config.model_type},
        dtype=name or "float32",
        attn_implementation=section.attn_implementation or _ATTENTION,
    )
    try:
        return build_model(config, planned, seed=0, kind=kind)
    except ValueError:  # an architecture that takes no attention but its own
        planned = planned.model_copy(update={"attn_implementation": section.attn_implementation})
        return build_model(config, planned, seed=0, kind=kind)


def student_without_values(
    config: PreTrainedConfig, section: StudentSection, kind: str, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """The student with its adapters; inside `without_values`."""
    model = model_without_values(config, section, kind, dtype)
    if section.peft is None:
        return model
    with _adapters_stay():
        return apply_peft(model, section.peft, seed=0)


@contextmanager
def _adapters_stay() -> Iterator[None]:
    """PEFT moves adapters to the device of their base, which tensors without values refuse."""
    before = nn.Module.to
    nn.Module.to = lambda module, *args, **kwargs: module
    try:
        yield
    finally:
        nn.Module.to = before

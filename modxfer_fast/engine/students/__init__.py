"""What is trained: a language model, an encoder, a classifier."""

from modxfer_fast.engine.students.causal_lm import SplitCausalLM
from modxfer_fast.engine.students.classifier import TaskClassifier
from modxfer_fast.engine.students.encoder import EncoderBackbone
from modxfer_fast.engine.students.protocol import ModelParts

STUDENTS: dict[str, type[ModelParts]] = {
    parts.kind: parts for parts in (SplitCausalLM, EncoderBackbone, TaskClassifier)
}


def student_of_kind(kind: str) -> type[ModelParts]:
    """The class of a kind, by its name in configurations, or a ValueError that names all."""
    if kind not in STUDENTS:
        raise ValueError(f"kind: expected one of {', '.join(STUDENTS)}, got {kind!r}")
    return STUDENTS[kind]

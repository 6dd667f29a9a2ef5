"""The kinds of students, by their names in configurations."""

from typing import Any

from modxfer_fast.engine.students.causal_lm import SplitCausalLM
from modxfer_fast.engine.students.classifier import TaskClassifier
from modxfer_fast.engine.students.encoder import EncoderBackbone
from modxfer_fast.engine.students.protocol import Student

STUDENTS: dict[str, Any] = {
    student.kind: student for student in (SplitCausalLM, EncoderBackbone, TaskClassifier)
}


def student_of_kind(kind: str) -> type[Student]:
    """The class of a kind, or a ValueError that names all."""
    if kind not in STUDENTS:
        raise ValueError(f"kind: expected one of {', '.join(STUDENTS)}, got {kind!r}")
    return STUDENTS[kind]

"""Distillation on Hugging Face Trainer and DeepSpeed: needs `pip install modxfer-fast[engine]`."""

from .checkpoint import last_complete_checkpoint
from .config import DistillConfig
from .guard import NonFiniteError
from .module import DistillModule
from .objective import Objective
from .projections import load_projections
from .task_distillation import (
    TaskDistillTrainer,
    TaskHiddenOptions,
    TaskTextCollator,
    distil_task,
)
from .teacher import Teacher, TeacherPlan
from .trainer import DistillTrainer

__all__ = [
    "DistillConfig",
    "DistillModule",
    "DistillTrainer",
    "NonFiniteError",
    "Objective",
    "TaskDistillTrainer",
    "TaskHiddenOptions",
    "TaskTextCollator",
    "Teacher",
    "TeacherPlan",
    "distil_task",
    "last_complete_checkpoint",
    "load_projections",
]

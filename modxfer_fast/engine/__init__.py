"""Distillation on Hugging Face Trainer and DeepSpeed: needs `pip install modxfer-fast[engine]`."""

from modxfer_fast.data.collator import TaskTextCollator
from modxfer_fast.engine.checkpoint import last_complete_checkpoint
from modxfer_fast.engine.config import DistillConfig
from modxfer_fast.engine.features.projections import load_projections
from modxfer_fast.engine.guard import NonFiniteError
from modxfer_fast.engine.module import DistillModule
from modxfer_fast.engine.objective import Objective
from modxfer_fast.engine.on_policy.rollouts import Rollouts, Sampling
from modxfer_fast.engine.tasks.distillation import TaskHiddenOptions, distil_task
from modxfer_fast.engine.teachers.cached import CachedTeacher
from modxfer_fast.engine.teachers.protocol import TeacherProtocol
from modxfer_fast.engine.teachers.quantized import QuantizedTeacher
from modxfer_fast.engine.teachers.replica import Teacher
from modxfer_fast.engine.teachers.self_teacher import SelfDistillation
from modxfer_fast.engine.teachers.served import ServedTeacher
from modxfer_fast.engine.teachers.several import SeveralTeachers
from modxfer_fast.engine.teachers.sharded import ShardedTeacher
from modxfer_fast.engine.trainer import DistillTrainer

__all__ = [
    "CachedTeacher",
    "DistillConfig",
    "DistillModule",
    "DistillTrainer",
    "NonFiniteError",
    "Objective",
    "QuantizedTeacher",
    "Rollouts",
    "Sampling",
    "SelfDistillation",
    "ServedTeacher",
    "SeveralTeachers",
    "ShardedTeacher",
    "TaskHiddenOptions",
    "TaskTextCollator",
    "Teacher",
    "TeacherProtocol",
    "distil_task",
    "last_complete_checkpoint",
    "load_projections",
]

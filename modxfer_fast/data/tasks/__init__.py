"""Labelled tasks: named entities, natural-language inference, paraphrase identification.

A section -> examples in three splits -> rows and labels -> scores.
"""

from modxfer_fast.data.collator import TaskTextCollator
from modxfer_fast.data.tasks.encoding import EncodedTask, encode_task, task_collator
from modxfer_fast.data.tasks.load import TaskData, load_task
from modxfer_fast.data.tasks.metrics import (
    PRIMARY_METRIC,
    class_scores,
    entity_scores,
    task_scores,
)
from modxfer_fast.data.tokenizer import check_task_tokenizer, load_task_tokenizer

__all__ = [
    "PRIMARY_METRIC",
    "EncodedTask",
    "TaskData",
    "TaskTextCollator",
    "check_task_tokenizer",
    "class_scores",
    "encode_task",
    "entity_scores",
    "load_task",
    "load_task_tokenizer",
    "task_collator",
    "task_scores",
]

"""What a trainer replaces micro-batches by, as its arguments say."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from modxfer_fast.config import OnPolicySection
from modxfer_fast.data.collator import CausalCollator
from modxfer_fast.engine.config import DistillConfig
from modxfer_fast.engine.main_rank import on_main
from modxfer_fast.engine.module import DistillModule
from modxfer_fast.engine.on_policy.generation import StudentRollouts, sampling_of
from modxfer_fast.engine.on_policy.mixing import Batch, OnPolicy
from modxfer_fast.engine.on_policy.rollouts import Rollouts
from modxfer_fast.engine.on_policy.vllm import VLLMRollouts
from modxfer_fast.engine.teachers.cached import Answering, CachedTeacher
from modxfer_fast.engine.teachers.several import SeveralTeachers


def on_policy_of(
    args: DistillConfig,
    module: DistillModule,
    tokenizer: Any,
    num_tokens: int | None,
    rollouts: Rollouts | None,
    autocast: Callable[[], AbstractContextManager],
    whole: Callable[[], AbstractContextManager],
) -> OnPolicy | None:
    """None without args.on_policy.

    Args:
        num_tokens: of the tokenizer, None where it does not tell.
        rollouts: who writes; None for the student, or the vLLM that args.on_policy names.
        autocast: opens the context that the student computes in.
        whole: opens the one in which each rank has the student whole.

    Raises:
        ValueError: the teacher's answers were kept before the student writes.
    """
    section = args.on_policy_options()
    if section is None:
        return None
    teacher: Any = module.teacher
    if isinstance(teacher, CachedTeacher) or (
        isinstance(teacher, SeveralTeachers) and teacher.is_cached
    ):
        raise ValueError(
            "teacher: expected one that answers now, with on_policy: what the student will write "
            "is in no cache"
        )
    if rollouts is None:
        rollouts = _rollouts(section, args, module.student, autocast, whole)
    pad = getattr(tokenizer, "pad_token_id", None)
    collate: Any = module.collator(CausalCollator(0 if pad is None else pad, packed=False))
    answered: Callable[[Batch], Batch] = _as_it_is
    if isinstance(collate, Answering):
        collate, answered = collate.collator, collate.answered
    return OnPolicy(
        section,
        sampling_of(section, module.student, tokenizer, module.common_classes(num_tokens)),
        rollouts,
        collate,
        args.seed,
        args.process_index,
        answered,
    )


def _rollouts(
    section: OnPolicySection,
    args: DistillConfig,
    student: nn.Module,
    autocast: Callable[[], AbstractContextManager],
    whole: Callable[[], AbstractContextManager],
) -> Rollouts:
    if section.vllm is None:
        return StudentRollouts(student, autocast, section.batch_size, whole)
    return VLLMRollouts(
        student,
        section.vllm,
        args.output_dir,
        is_main=args.process_index == 0,
        on_main=on_main,
        autocast=autocast,
        whole=whole,
    )


def _as_it_is(batch: Batch) -> Batch:
    return batch

"""What a step needs beside what stands, and how much it computes: it runs, on shapes alone."""

import contextlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import PreTrainedModel

from modxfer_fast.config import LossSection
from modxfer_fast.engine import DistillModule, Objective, SelfDistillation, Teacher
from modxfer_fast.engine.batch import Answer, Batch
from modxfer_fast.engine.students.causal_lm import SplitCausalLM
from modxfer_fast.jobs.plan.memory import half_dtype
from modxfer_fast.kernels.common.head import Head
from modxfer_fast.kernels.linear_kd_loss.stream import plan_of
from modxfer_fast.measure.claimed import OnGPU
from modxfer_fast.measure.live import LiveBytes


class PlannedStep(NamedTuple):
    """Of one micro-batch.

    Attributes:
        bytes: most that exists at once, beside parameters and gradients.
        workspace: bytes of it in the loss of the logits.
        flops: of its matrix products.
    """

    bytes: int
    workspace: int
    flops: int


def planned_step(
    student: PreTrainedModel,
    teacher: PreTrainedModel | SelfDistillation,
    loss: LossSection,
    training: Mapping[str, Any],
    rows: int,
    length: int,
    *,
    answered: bool = False,
    on_gpu: bool = True,
) -> PlannedStep:
    """A forward and backward of `rows` sequences of `length` tokens, all of them labelled.

    Args:
        student, teacher: without values, or how the student teaches itself.
        loss, training: sections of the job.
        answered: whether the teacher's hidden states come with the batch.
    """
    is_student = isinstance(teacher, SelfDistillation)
    with_head: Any = student if is_student else teacher
    answering: Any = teacher
    if not is_student:
        answering = Answered(with_head) if answered else Teacher(with_head)
    module = DistillModule(student, answering, Objective(**loss.of_logits())).train()
    if training.get("gradient_checkpointing") or training.get("activation_checkpointing"):
        options = training.get("gradient_checkpointing_kwargs")
        module.gradient_checkpointing_enable(options or {"use_reentrant": False})
    half = half_dtype(training)
    autocast = torch.autocast("cpu", half) if half is not None else contextlib.nullcontext()
    ids = torch.zeros(rows, length, dtype=torch.int64)
    number = rows * length

    def run() -> None:
        with autocast:
            found = module(input_ids=ids, labels=ids, num_valid=number, num_tokens=number)
        found["loss"].backward()

    with unset_fake_temporarily():
        heads = student.get_output_embeddings().weight, with_head.get_output_embeddings().weight
        workspace, products = _loss_of_logits(heads, loss, number, half, on_gpu)

    def inside(operator: Any) -> int:
        # a CPU keeps it from one call to the next
        return workspace if on_gpu and "linear_kd_loss" in str(operator) else 0

    run()  # leaves the gradients, which stand
    live = LiveBytes(inside)
    with live:
        run()
    peak = live.peak if on_gpu else live.peak + workspace
    return PlannedStep(peak, workspace, live.flops + products)


class Answered:
    """A teacher whose hidden states are there."""

    kind = "causal_lm"
    num_tokens = None

    def __init__(self, model: PreTrainedModel):
        parts = SplitCausalLM.of(model, "teacher")
        self.classes = parts.classes
        self._head, self._bend = parts.weight_and_bias(), parts.bend

    def answer(self, batch: Batch, taps: None = None) -> Answer:
        ids, (weight, bias) = batch.inputs["input_ids"], self._head
        hidden = weight.new_empty(*ids.shape, weight.shape[1])
        return Answer(hidden, (weight.detach(), bias), bend=self._bend)


def _loss_of_logits(
    weights: tuple[Tensor, Tensor],
    loss: LossSection,
    number: int,
    half: torch.dtype | None,
    on_gpu: bool,
) -> tuple[int, int]:
    """Bytes and FLOPs of the fused loss of two heads, whose operator hides both."""
    student, teacher = weights

    def claimed(*size: int, dtype: torch.dtype) -> Tensor:
        if on_gpu:
            return OnGPU.make(*size, dtype=dtype)
        return torch.empty(size, dtype=dtype, device="meta")

    heads = [
        Head(
            claimed(number, weight.shape[1], dtype=half or weight.dtype),
            claimed(*weight.shape, dtype=half or weight.dtype),
        )
        for weight in (student, teacher)
    ]
    wanted = {"hidden", "weight"} if student.requires_grad else {"hidden"}
    wide = torch.promote_types(heads[0].weight.dtype, torch.float32)
    budget = None if loss.workspace_mb is None else loss.workspace_mb * 2**20
    plan = plan_of(heads[0], heads[1], number, wanted, wide, budget)
    classes, own = student.shape
    sums = 0 if plan.is_single or "weight" not in wanted else wide.itemsize * student.numel()
    pairs = 2 * wide.itemsize * plan.rows * classes
    slab = heads[0].weight.itemsize * plan.slab * classes
    flops = 2 * number * classes * (own * (1 + len(wanted)) + teacher.shape[1])
    return pairs + slab + (sums if half is not None else 0), flops

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
from modxfer_fast.kernels.kd_loss.topk import TeacherTopK
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
    top_k: int | None = None,
    on_gpu: bool = True,
) -> PlannedStep:
    """A forward and backward of `rows` sequences of `length` tokens, all of them labelled.

    Args:
        student, teacher: without values, or how the student teaches itself.
        loss, training: sections of the job.
        answered: whether the teacher's hidden states come with the batch.
        top_k: listed classes of each token, which come with the batch in their place.
    """
    is_student = isinstance(teacher, SelfDistillation)
    with_head: Any = student if is_student else teacher
    answering: Any = teacher
    if top_k is not None:
        answering = Listing(with_head, top_k)
    elif not is_student:
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
        workspace, products = _loss_of_logits(heads, loss, number, half, on_gpu, top_k)

    def inside(operator: Any) -> int:
        # a CPU keeps it from one call to the next
        is_loss = "linear_kd_loss" in str(operator) or "linear_topk_kd_loss" in str(operator)
        return workspace if on_gpu and is_loss else 0

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


class Listing(Answered):
    """A teacher of whom the likeliest classes of each token are there."""

    def __init__(self, model: PreTrainedModel, top_k: int):
        super().__init__(model)
        self._top_k = top_k

    def answer(self, batch: Batch, taps: None = None) -> Answer:
        shape = *batch.inputs["input_ids"].shape, self._top_k
        ids = torch.zeros(shape, dtype=torch.int32)
        log_probs = torch.zeros(shape)
        return Answer(log_probs, listed=TeacherTopK(ids, log_probs))


def _loss_of_logits(
    weights: tuple[Tensor, Tensor],
    loss: LossSection,
    number: int,
    half: torch.dtype | None,
    on_gpu: bool,
    top_k: int | None,
) -> tuple[int, int]:
    """Bytes and FLOPs of the fused loss of two heads, whose operator hides both.

    Args:
        top_k: listed classes of a token, in the place of the teacher's head.
    """
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
    taught: Any = heads[1]
    if top_k is not None:
        ids = claimed(number, top_k, dtype=torch.int32)
        taught = TeacherTopK(ids, claimed(number, top_k, dtype=torch.float32))
    plan = plan_of(heads[0], taught, number, wanted, wide, budget)
    classes, own = student.shape
    sums = 0 if plan.is_single or "weight" not in wanted else wide.itemsize * student.numel()
    chunks = (1 + taught.num_buffers) * wide.itemsize * plan.rows * classes
    slab = heads[0].weight.itemsize * plan.slab * classes
    of_teacher = 0 if top_k is not None else teacher.shape[1]
    flops = 2 * number * classes * (own * (1 + len(wanted)) + of_teacher)
    return chunks + slab + (sums if half is not None else 0), flops

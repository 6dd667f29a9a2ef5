"""What a step needs beside what stands, and how much it computes: it runs, on shapes alone."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import PreTrainedModel

from modxfer_fast.config import LossSection
from modxfer_fast.engine import DistillModule, Objective, SeveralTeachers
from modxfer_fast.engine.batch import Answer, Batch, Route
from modxfer_fast.engine.features.taps import LayerTaps
from modxfer_fast.engine.students.causal_lm import SplitCausalLM
from modxfer_fast.engine.teachers.several import INDEX, ROWS
from modxfer_fast.jobs.plan.memory import half_dtype
from modxfer_fast.kernels.kd_loss.topk import TeacherTopK
from modxfer_fast.kernels.linear_kd_loss.mixture import TeacherHead, TeacherMixture
from modxfer_fast.kernels.linear_kd_loss.stream import plan_of
from modxfer_fast.measure.claimed import OnGPU
from modxfer_fast.measure.live import LiveBytes


class PlannedStep(NamedTuple):
    """Of one micro-batch.

    Attributes:
        bytes: most that exists at once, beside parameters, and gradients that were there.
        workspace: bytes of it in the loss of the logits.
        flops: of its matrix products.
    """

    bytes: int
    workspace: int
    flops: int


def planned_step(
    student: PreTrainedModel,
    teacher: Any,
    loss: LossSection,
    training: Mapping[str, Any],
    rows: int,
    length: int,
    *,
    gradients: bool = True,
    on_gpu: bool = True,
) -> PlannedStep:
    """A forward and backward of `rows` sequences of `length` tokens, all of them labelled.

    Args:
        student: without values.
        teacher: as `DistillModule` takes it, without values too. Rows are shared out to several
            that are routed.
        loss, training: sections of the job.
    """
    module = DistillModule(student, teacher, Objective(**loss.of_logits())).train()
    if training.get("gradient_checkpointing") or training.get("activation_checkpointing"):
        options = training.get("gradient_checkpointing_kwargs")
        module.gradient_checkpointing_enable(options or {"use_reentrant": False})
    half = half_dtype(training)
    autocast = torch.autocast("cpu", half) if half is not None else contextlib.nullcontext()
    ids = torch.zeros(rows, length, dtype=torch.int64)
    number = rows * length
    route = _route(teacher, rows, length)
    inputs = {"input_ids": ids, "labels": ids, "num_valid": number, "num_tokens": number}
    if route is not None:
        inputs |= {INDEX: route.numbers, ROWS: route.rows}

    def run() -> None:
        with autocast:
            found = module(**inputs)
        found["loss"].backward()

    assert module.teacher is not None
    answer = module.teacher.answer(Batch({"input_ids": ids}, route=route))
    weight = student.get_output_embeddings().weight
    with unset_fake_temporarily():
        calls = [
            _loss_of_logits(weight, each, loss, of_each, half, on_gpu)
            for each, of_each in _calls(answer, number)
        ]
    workspace, products = max(size for size, _ in calls), sum(flops for _, flops in calls)
    del answer

    def inside(operator: Any) -> int:
        # a CPU keeps it from one call to the next
        is_loss = "linear_kd_loss" in str(operator) or "linear_topk_kd_loss" in str(operator)
        return workspace if on_gpu and is_loss else 0

    if gradients:
        run()
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
        self.model = model.requires_grad_(False)
        self.classes = parts.classes
        self._head, self._bend = parts.weight_and_bias(), parts.bend

    def to(self, device: torch.device) -> "Answered":
        return self

    def nonfinite_parameters(self) -> list[str]:
        return []

    def taps(self) -> LayerTaps:
        raise ValueError("teacher: expected one whose layers can be seen, got answers")

    def answer(self, batch: Batch, taps: LayerTaps | None = None) -> Answer:
        ids, (weight, bias) = batch.inputs["input_ids"], self._head
        hidden = weight.new_empty(*ids.shape, weight.shape[1])
        return Answer(hidden, (weight.detach(), bias), bend=self._bend)


class Listing(Answered):
    """A teacher of whom the likeliest classes of each token are there."""

    is_listed = True

    def __init__(self, model: PreTrainedModel, top_k: int):
        super().__init__(model)
        self._top_k = top_k

    def answer(self, batch: Batch, taps: LayerTaps | None = None) -> Answer:
        shape = *batch.inputs["input_ids"].shape, self._top_k
        ids = torch.zeros(shape, dtype=torch.int32)
        log_probs = torch.zeros(shape)
        return Answer(log_probs, listed=TeacherTopK(ids, log_probs))


def _route(teacher: Any, rows: int, length: int) -> Route | None:
    """Whole rows in turn to each of several teachers, None to others."""
    if not isinstance(teacher, SeveralTeachers) or teacher.of != "route":
        return None
    count = len(teacher.teachers)
    numbers = (torch.arange(rows) % count)[:, None].expand(rows, length)
    return Route(numbers, [torch.arange(first, rows, count) for first in range(count)])


def _calls(answer: Answer, number: int) -> Iterator[tuple[Answer, int]]:
    """What each call of the loss is about, and of how many tokens: alike of all that are routed."""
    for share in answer.shares:
        yield share.answer, number if share.tokens is None else number // len(answer.shares)
    if not answer.shares:
        yield answer, number


def _loss_of_logits(
    weight: Tensor,
    answer: Answer,
    loss: LossSection,
    number: int,
    half: torch.dtype | None,
    on_gpu: bool,
) -> tuple[int, int]:
    """Bytes and FLOPs of the fused loss, whose operator hides both.

    Args:
        weight: of the student's head.
        answer: of the teacher, whose shapes count.
    """

    def claimed(*size: int, dtype: torch.dtype) -> Tensor:
        if on_gpu:
            return OnGPU.make(*size, dtype=dtype)
        return torch.empty(size, dtype=dtype, device="meta")

    def head_of(weight: Tensor) -> TeacherHead:
        dtype = half or weight.dtype
        return TeacherHead(
            claimed(number, weight.shape[1], dtype=dtype), claimed(*weight.shape, dtype=dtype)
        )

    student: Any = head_of(weight).kind()
    width, taught = _taught(answer, number, head_of, claimed)
    wanted = {"hidden", "weight"} if weight.requires_grad else {"hidden"}
    wide = torch.promote_types(student.weight.dtype, torch.float32)
    budget = None if loss.workspace_mb is None else loss.workspace_mb * 2**20
    plan = plan_of(student, taught, number, wanted, wide, budget)
    classes, own = weight.shape
    sums = 0 if plan.is_single or "weight" not in wanted else wide.itemsize * weight.numel()
    chunks = (1 + taught.num_buffers) * wide.itemsize * plan.rows * classes
    slab = student.weight.itemsize * plan.slab * classes
    flops = 2 * number * classes * (own * (1 + len(wanted)) + width)
    return chunks + slab + (sums if half is not None else 0), flops


def _taught(
    answer: Answer,
    number: int,
    head_of: Callable[[Tensor], TeacherHead],
    claimed: Callable[..., Tensor],
) -> tuple[int, Any]:
    """Width of the products with a teacher's heads, and the teacher as the operator has it."""
    if answer.listed is not None:
        size = number, answer.listed.ids.shape[-1]
        ids = claimed(*size, dtype=torch.int32)
        return 0, TeacherTopK(ids, claimed(*size, dtype=torch.float32))
    if answer.mixture is None:
        assert answer.head is not None
        return answer.head[0].shape[1], head_of(answer.head[0]).kind()
    mixture = answer.mixture
    heads = [head_of(each.weight) for each in mixture.teachers]
    route = None if mixture.route is None else claimed(number, dtype=torch.int64)
    kind = TeacherMixture(heads, mixture.weights, mixture.of, route).kind()
    return sum(each.weight.shape[1] for each in mixture.teachers), kind

"""The K likeliest classes of a teacher, for a cache: ids, log-probabilities, the mass of the rest.

N rows (B*T tokens)   V classes   D_t width   z = teacher_hidden teacher_weight^T + teacher_bias, or
cap tanh(scale z / cap) of a model that has either, divided by the temperature

    ids        the classes of the K largest logits, in descending order; of equal ones the lower
               id comes first
    log_probs  log softmax(z) of each
    log_tail   log of the sum of the softmax over the other classes, not of 1 minus that over these

The loop of `linear_kd_loss` without a student: logits exist for one chunk of rows at a time, fp32
whatever the dtype of the head, and are read where they lie, by a row kernel that finds all three
(`teacher_topk` of the backends of `kd_loss`). The order is that of the logits before scale, cap and
temperature, which two backends see alike.

FLOPs: 2 N V D_t; none where the logits are there already, which are read once or twice.
Limits: no gradient; classes that are divided over ranks are not merged.
"""

import math
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from modxfer_fast.kernels import dispatch
from modxfer_fast.kernels.common import (
    Bend,
    KDSpec,
    check_tensor,
    debug_check_finite,
    gemm,
    refuse_transforms,
    without_autocast,
)
from modxfer_fast.kernels.common.chunks import ChunkPlan, budget_for, spans
from modxfer_fast.kernels.common.composed_head import ComposedHead
from modxfer_fast.kernels.common.head import Head
from modxfer_fast.kernels.common.parallel_head import Weight
from modxfer_fast.kernels.common.rows import Launch
from modxfer_fast.kernels.common.scalars import check_integer, check_number
from modxfer_fast.kernels.common.scratch import logits_buffers, pitch
from modxfer_fast.kernels.common.streamed_op import define_op, inputs_of
from modxfer_fast.kernels.kd_loss.topk import TeacherTopK, check_listed
from modxfer_fast.kernels.linear_kd_loss.op import kinds_of, tensors_of
from modxfer_fast.kernels.linear_kd_loss.teachers import Teacher, Values, refuse_bend, teacher_of


def teacher_topk(
    teacher_hidden: Tensor | Teacher,
    teacher_weight: Weight | None = None,
    *,
    k: int,
    temperature: float = 1.0,
    teacher_bias: Tensor | None = None,
    teacher_logit_scale: float = 1.0,
    teacher_softcap: float | None = None,
    workspace_mb: int | None = None,
    backend: str | None = None,
) -> TeacherTopK:
    """The k likeliest classes of each row of a teacher, without storing its logits.

    What a loss needs of a teacher that does not run beside the student; its fields are what a cache
    keeps, ids and log_probs in any integer and float dtype that `TeacherTopK` takes:

        cached = teacher_topk(teacher_hidden, teacher_weight, k=64)
        loss = linear_kd_loss(student_hidden, student_weight, cached)

    Args:
        teacher_hidden: [..., D_t], fp64, fp32, fp16 or bf16. Or `TeacherLogits`, `TeacherLogProbs`
            or `TeacherProbs`, [..., V].
        teacher_weight: [V, D_t], dtype of teacher_hidden; or a `LoraWeight`, or a
            `QuantizedWeight`. None beside a teacher of another kind.
        k: how many classes, in [1, V].
        temperature: positive number that divides the logits. A loss has to have the same one, which
            the result says, or the tail "renormalise": a cache for losses at other temperatures is
            taken at 1, and read with `._replace(tail="renormalise")`.
        teacher_bias: [V], dtype of teacher_weight.
        teacher_logit_scale, teacher_softcap: what the teacher's model does to the logits of its
            head, as in `linear_kd_loss`.
        workspace_mb: MiB for the logits in flight, as in `linear_kd_loss`. "triton", whose rows are
            `torch.topk`, and the reference take several times as much beside them.
        backend: "cuda", "triton", "cpp" or "reference"; None takes the best available.

    Returns:
        `TeacherTopK` with the tail "bucket": ids [..., k] int32, log_probs [..., k] and log_tail
        [...] fp32 (fp64 for fp64 inputs). A row with fewer than k classes whose logit is not -inf
        has ids of -1 and log_probs of -inf behind them. A row without a softmax, which holds NaN or
        +inf or nothing but -inf, has ids 0 to k - 1, and NaN.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
        RuntimeError: under torch.func's gradients or forward-mode differentiation.
        BackendError: the backend asked for cannot run these inputs.

    Under `torch.autocast` hidden states and head are cast as `F.linear` would.
    """
    teacher: Any = teacher_of(teacher_hidden, teacher_weight, teacher_bias)
    if type(teacher) not in _OPS:
        raise TypeError(
            "teacher_hidden: expected hidden states beside a whole weight, TeacherLogits, "
            f"TeacherLogProbs or TeacherProbs, got a {type(teacher).__name__}"
        )
    given = tensors_of("teacher", teacher)
    for name, tensor in given.items():
        check_tensor(name, tensor)
    refuse_transforms("teacher_topk", *given.values())
    check_number("temperature", temperature)
    spec = KDSpec(
        temperature=temperature,
        teacher_logit_scale=teacher_logit_scale,
        teacher_softcap=teacher_softcap,
    ).checked()
    teacher = teacher.detach().cast()
    teacher.check("teacher")
    refuse_bend(teacher, spec)
    launch = Launch(workspace_mb, backend)
    launch.check()
    check_integer("k", k)
    if not 1 <= k <= teacher.vocab_size:
        raise ValueError(f"k: expected a number in [1, {teacher.vocab_size}], of classes, got {k}")
    states = _states(teacher)
    backend = dispatch.resolve("kd_loss", states, backend=backend)
    lead = states.shape[:-1]
    inputs = (*teacher.flat(math.prod(lead)), k, spec.numbers(), spec.names(), workspace_mb)
    ids, log_probs, log_tail = _OPS[type(teacher)](*inputs, backend)
    return TeacherTopK(
        ids.reshape(*lead, k),
        log_probs.reshape(*lead, k),
        temperature=temperature,
        log_tail=log_tail.reshape(lead),
    )


def _states(teacher: Any) -> Tensor:
    """What the teacher's rows are rows of."""
    return teacher.values if isinstance(teacher, Values) else teacher.hidden


def _empty(states: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Room for ids, log_probs [N, k] and log_tail [N] of states [N, D]."""
    rows, dtype = states.shape[0], torch.promote_types(states.dtype, torch.float32)
    log_probs = states.new_empty(rows, k, dtype=dtype)
    return states.new_empty(rows, k, dtype=torch.int32), log_probs, log_probs.new_empty(rows)


def _stream(
    kernels: ModuleType, teacher: Any, k: int, spec: KDSpec, workspace_bytes: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """ids, log_probs, log_tail of a teacher [N, ...]; `kernels` as of `stream.stream`."""
    states, classes = _states(teacher), teacher.vocab_size
    check_listed(kernels, k, classes, states.device, finds=True)
    found = _empty(states, k)
    dtype = found[1].dtype
    # before the row kernel, whose order is that of the sums; values have none and stay
    bias = Bend(bias=getattr(teacher, "logit_bias", None))
    widened = teacher.widened_bytes(dtype)
    row_bytes = dtype.itemsize * pitch(classes) + widened
    budget = budget_for(workspace_bytes, row_bytes, on_gpu=states.is_cuda)
    plan = ChunkPlan.of(states.shape[0], row_bytes, budget, widened_bytes=widened)
    with (
        logits_buffers(plan.rows, classes, dtype, states.device, teacher.num_buffers) as buffers,
        gemm.fp32_sums(states),
    ):
        for span in spans(states.shape[0], plan.rows):
            logits = bias.apply(teacher.take(span, None).signal(buffers, plan.tile, spec))
            for whole, part in zip(found, kernels.teacher_topk(logits, k, spec), strict=True):
                whole[span] = part
    return found


def _op(name: str, kind: type[Any]) -> torch._ops.OpOverload:
    """Defines the op of a kind of teacher, a NamedTuple whose fields become inputs of it."""
    of_teacher = kinds_of("teacher", kind)
    options = {"k": int, "numbers": Tensor, "names": str, "workspace_mb": int | None}

    def run(inputs: Any) -> tuple[Tensor, ...]:
        teacher = kind(*inputs[: len(of_teacher)])
        spec = KDSpec.read(inputs.names, inputs.numbers)
        if hasattr(teacher, "check_values"):
            teacher.check_values(spec, None, teacher.vocab_size)
        debug_check_finite(**tensors_of("teacher", teacher))
        mib = inputs.workspace_mb
        with without_autocast(_states(teacher).device.type):
            kernels = dispatch.load("kd_loss", inputs.backend)
            return _stream(kernels, teacher, inputs.k, spec, None if mib is None else mib * 2**20)

    return define_op(
        name,
        inputs_of({**of_teacher, **options, "backend": str}),
        ("ids", "log_probs", "log_tail"),
        run=run,
        fake=lambda inputs: _empty(_states(kind(*inputs[: len(of_teacher)])), inputs.k),
    )


_OPS: dict[type, torch._ops.OpOverload] = {
    kind: _op(f"teacher_topk{suffix}", kind)
    for suffix, kind in (("", Head), ("_of_tiles", ComposedHead), ("_of_values", Values))
}

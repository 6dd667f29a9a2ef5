"""Losses between attention relations of student and teacher: MiniLM and MiniLMv2.

B sequences   T tokens   A relation heads   H_s, H_t widths   d = H / A   p teacher   q student

    relation(a, b)[h] = softmax(a_h b_h^T / sqrt(d))       a_h, b_h [T, d]: columns of head h
    loss_i = 1/A sum_h KL(relation(teacher)[h, i] || relation(student)[h, i])     of query token i

MiniLM (Wang et al. 2020, arXiv 2002.10957): relation(query, key), which is the attention, and
relation(value, value). MiniLMv2 (Wang et al. 2021, arXiv 2012.15828): relations of query, key and
value with themselves. The concatenated heads of a layer are split again into A relation heads, so A
need not be the number of attention heads, and d differs between student and teacher.

For every sequence and head this is a small linear KD loss: queries are its rows, keys its head and
tokens its classes. Its gradient is computed in the forward, by the row kernels of room `kd_loss`,
and logits [B, A, T, T] exist for one block at a time; see stream.py. They are fp32 at the
softmax whatever the dtype of the inputs; a key without probability is -inf.

FLOPs: 2 B T^2 (3 H_s + H_t), about half of it when causal; 2 B T^2 (H_s + H_t) without gradient,
which reduction="none" spends once more in its backward.
Limits: no gradient to the teacher; no double backward.
"""

import math

import torch
from torch import Tensor

from modxfer_fast.kernels import dispatch
from modxfer_fast.kernels.common import (
    cast_for_autocast,
    check_float,
    check_integer,
    check_number,
    check_reduction,
    check_row_tensor,
    check_same_device,
    check_tensors,
    check_workspace,
    combine_row_weights,
    debug_check_finite,
    denominator,
    refuse_transforms,
    without_autocast,
)
from modxfer_fast.kernels.common.streamed_op import Gradients, StreamedOp
from modxfer_fast.kernels.relation_loss.stream import Inputs


def relation_loss(
    student_a: Tensor,
    student_b: Tensor | None,
    teacher_a: Tensor,
    teacher_b: Tensor | None,
    *,
    num_heads: int,
    mask: Tensor | None = None,
    causal: bool = False,
    token_weights: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    reduction: str = "mean",
    workspace_mb: int = 64,
    backend: str | None = None,
) -> Tensor:
    """KL of the teacher's relation softmax(a b^T / sqrt(d)) from the student's, per query token.

    Args:
        student_a: [B, T, H_s], the queries of the relation; fp64, fp32, fp16 or bf16.
        student_b: [B, T, H_s], its keys, dtype of student_a. None or student_a itself: the relation
            of student_a with itself, whose gradient counts both roles.
        teacher_a: [B, T, H_t]; H_t and dtype may differ. A constant.
        teacher_b: [B, T, H_t], as student_b.
        num_heads: relation heads A; divides H_s and H_t. Grouped keys or values are repeated to the
            width of the queries first.
        mask: [B, T] bool, True for a real token. Padding counts neither as a query nor as a key,
            and may hold anything, NaN included.
        causal: token i sees the tokens j <= i only, as in a decoder.
        token_weights: [B, T], multiplies each query's loss; does not enter the mean's denominator.
            A constant.
        normalizer: positive number or 0-d tensor that replaces the mean's denominator, the number
            of real tokens. Under gradient accumulation: the tokens of the whole step. A tensor of
            0, a step without tokens, divides by 1.
        reduction: "mean", "sum", or "none" (shape [B, T]), whose backward recomputes the logits
            because each token brings a gradient of its own. Heads are averaged in all of them.
        workspace_mb: MiB for the logits in flight and for what is copied of the heads they belong
            to. Exceeded where 16 rows of one head do not fit. A CPU uses 8 of them at most.
        backend: "triton", "cuda", "cpp" or "reference"; None takes the best available.
            "cuda" runs by name alone.

    Returns:
        fp32 scalar, or [B, T] for reduction="none" (fp64 for fp64 inputs). 0 if no token counts.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
        RuntimeError: under torch.func's gradients or forward-mode differentiation.
        BackendError: the backend asked for cannot run these inputs.

    Under `torch.autocast` the inputs are cast as `F.linear` would.
    """
    sides = {
        "student_a": student_a,
        "student_b": student_b,
        "teacher_a": teacher_a,
        "teacher_b": teacher_b,
    }
    check_tensors(**sides)
    refuse_transforms("relation_loss", *sides.values())
    check_reduction(reduction, normalizer)
    student_b = None if student_b is student_a else student_b
    teacher_b = None if teacher_b is teacher_a else teacher_b
    student_a, student_b = cast_for_autocast(student_a, student_b)
    teacher_a, teacher_b = cast_for_autocast(
        teacher_a.detach(), None if teacher_b is None else teacher_b.detach()
    )
    _check(student_a, student_b, teacher_a, teacher_b, num_heads, mask, token_weights)
    check_workspace(workspace_mb)
    backend = dispatch.resolve("relation_loss", student_a, teacher_a, backend=backend)

    rows = student_a.shape[:2]
    tokens = student_a.detach()[..., 0].reshape(math.prod(rows))
    valid = None if mask is None else mask.reshape(-1)
    dtype = torch.promote_types(student_a.dtype, torch.float32)
    weights = combine_row_weights(valid, token_weights, tokens, dtype)
    divisor = denominator(reduction, normalizer, valid, tokens, dtype)
    # fp16 would lose gradients of size 1/N: there the normaliser joins the upstream gradient
    late = student_a.dtype == torch.float16
    if divisor is not None and not late:
        weights = weights / divisor

    inputs = Inputs(
        student_a,
        student_b,
        teacher_a,
        teacher_b,
        mask,
        weights.reshape(rows),
        num_heads,
        causal,
        workspace_mb,
        backend,
    )
    (loss,) = _op(inputs, reduction)
    return loss / divisor if late and divisor is not None else loss


def minilm_loss(
    student_qkv: tuple[Tensor, Tensor, Tensor],
    teacher_qkv: tuple[Tensor, Tensor, Tensor],
    *,
    num_heads: int,
    value_weight: float = 1.0,
    **options,
) -> Tensor:
    """MiniLM: KL of the attention distributions plus KL of the value relations, of one layer each.

    Args:
        student_qkv: (query, key, value), each [B, T, H_s]: what the three projections of an
            attention layer return, before they are split into heads. MiniLM takes the last layer.
        teacher_qkv: the same of the teacher, each [B, T, H_t].
        num_heads: attention heads, as many in both models.
        value_weight: factor of the value relation, 1 in the paper.
        options: mask, causal, token_weights, normalizer, reduction, workspace_mb and backend of
            `relation_loss`. `causal` holds for both relations.

    Rotary embeddings belong to query and key: pass them rotated.
    """
    s_query, s_key, s_value = _triple("student_qkv", student_qkv)
    t_query, t_key, t_value = _triple("teacher_qkv", teacher_qkv)
    check_number("value_weight", value_weight)
    for name, query, key in (("student_qkv", s_query, s_key), ("teacher_qkv", t_query, t_key)):
        check_tensors(**{f"query of {name}": query, f"key of {name}": key})
        if key.shape != query.shape:
            raise ValueError(
                f"{name}: expected keys of the shape of the queries, {tuple(query.shape)}, got "
                f"{tuple(key.shape)}; repeat grouped keys, or take minilmv2_loss"
            )
    options["num_heads"] = num_heads
    attention = relation_loss(s_query, s_key, t_query, t_key, **options)
    value = relation_loss(s_value, None, t_value, None, **options)
    return attention + value_weight * value


def minilmv2_loss(
    student_qkv: tuple[Tensor, Tensor, Tensor],
    teacher_qkv: tuple[Tensor, Tensor, Tensor],
    *,
    num_heads: int,
    weights: tuple[float, float, float] = (1.0, 1.0, 1.0),
    **options,
) -> Tensor:
    """MiniLMv2: weighted sum of the KL of query-query, key-key and value-value relations.

    Args:
        student_qkv: (query, key, value), each [B, T, ...]: what the three projections of an
            attention layer return. Grouped keys and values may be narrower than the queries.
        teacher_qkv: the same of the teacher. The paper takes its last layer for a base-size teacher
            and one a few layers below the top for a large one.
        num_heads: relation heads; divides every width. More than the attention heads (48 in the
            paper) describe finer relations.
        weights: factors of the three relations. One with weight 0 is not computed.
        options: mask, causal, token_weights, normalizer, reduction, workspace_mb and backend of
            `relation_loss`.
    """
    _triple("student_qkv", student_qkv)
    _triple("teacher_qkv", teacher_qkv)
    if len(weights) != 3 or not any(weights):
        raise ValueError(f"weights: expected three numbers, not all 0, got {weights}")
    for index, weight in enumerate(weights):
        check_number(f"weights[{index}]", weight)
    terms = [
        weight * relation_loss(student, None, teacher, None, num_heads=num_heads, **options)
        for student, teacher, weight in zip(student_qkv, teacher_qkv, weights, strict=True)
        if weight != 0.0
    ]
    return sum(terms[1:], start=terms[0])


def _triple(name: str, tensors) -> tuple[Tensor, Tensor, Tensor]:
    if not isinstance(tensors, (tuple, list)) or len(tensors) != 3:
        got = f"{len(tensors)} of them" if isinstance(tensors, (tuple, list)) else type(tensors)
        raise ValueError(f"{name}: expected a tuple of query, key and value, got {got}")
    return tuple(tensors)


def _check(student_a, student_b, teacher_a, teacher_b, num_heads, mask, token_weights) -> None:
    check_integer("num_heads", num_heads)
    if num_heads < 1:
        raise ValueError(f"num_heads: expected a positive number, got {num_heads}")
    for role, a, b in (("student", student_a, student_b), ("teacher", teacher_a, teacher_b)):
        check_float(f"{role}_a", a)
        if a.dim() != 3 or a.shape[-1] == 0:
            raise ValueError(f"{role}_a: expected shape [B, T, H] with H > 0, got {tuple(a.shape)}")
        if a.shape[-1] % num_heads:
            raise ValueError(
                f"num_heads: expected a divisor of {a.shape[-1]}, the width of {role}_a, "
                f"got {num_heads}"
            )
        if b is None:
            continue
        if b.shape != a.shape:
            raise ValueError(
                f"{role}_b: expected the shape of {role}_a, {tuple(a.shape)}, got {tuple(b.shape)}"
            )
        if b.dtype != a.dtype:
            raise TypeError(f"{role}_b: expected {a.dtype}, the dtype of {role}_a, got {b.dtype}")
        check_same_device(f"{role}_b", b, f"{role}_a", a)
    rows = student_a.shape[:2]
    if teacher_a.shape[:2] != rows:
        raise ValueError(
            f"teacher_a: expected the leading dimensions of student_a, {tuple(rows)}, "
            f"got {tuple(teacher_a.shape[:2])}"
        )
    check_same_device("teacher_a", teacher_a, "student_a", student_a)
    check_row_tensor("mask", mask, rows, "student_a", student_a)
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(f"mask: expected torch.bool, True for a real token, got {mask.dtype}")
    check_row_tensor("token_weights", token_weights, rows, "student_a", student_a)


def _run(inputs: Inputs, needs) -> tuple[Tensor, tuple[()], Gradients]:
    debug_check_finite(**dict(zip(Inputs._fields[:4], inputs[:4], strict=True)))
    weights = inputs.row_weights
    impl = dispatch.load("relation_loss", inputs.backend)
    with without_autocast(weights.device.type):
        kd, grads = impl.relation_loss_fwd(inputs, needs)
    # the divergence of padding may be NaN
    return torch.where(weights != 0, weights * kd, 0.0), (), grads


_op = StreamedOp("relation_loss", Inputs, run=_run, gradients=("student_a", "student_b"))

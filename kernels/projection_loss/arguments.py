"""What a user passes to a loss of hidden states, checked and brought to what the ops take."""

import dataclasses
import math
from typing import NamedTuple

import torch
from torch import Tensor

from modxfer_fast.kernels import dispatch
from modxfer_fast.kernels.common import (
    cast_for_autocast,
    check_float,
    check_reduction,
    check_row_tensor,
    check_same_device,
    check_tensor,
    check_workspace,
    combine_row_weights,
    denominator,
)
from modxfer_fast.kernels.projection_loss.spec import ProjectionSpec


class Inputs(NamedTuple):
    """What the ops take.

    Attributes:
        student_hidden, teacher_hidden: [N, D_s], [N, D_t].
        projection, projection_a: P, or P_b and P_a. bias: [D_t].
        mask: [N] bool or None.
        row_weights: [N], the factor of each row in the sum of losses.
        numbers, names: of a ProjectionSpec; "relative" is "mse", and part of the weights.
    """

    student_hidden: Tensor
    projection: Tensor | None
    projection_a: Tensor | None
    bias: Tensor | None
    teacher_hidden: Tensor
    mask: Tensor | None
    row_weights: Tensor
    numbers: Tensor
    names: str
    num_valid: torch.SymInt | None
    workspace_mb: int
    backend: str


def prepare(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    projection: Tensor | tuple[Tensor, Tensor] | None,
    *,
    bias: Tensor | None,
    spec: ProjectionSpec,
    mask: Tensor | None,
    token_weights: Tensor | None,
    normalizer: float | Tensor | None,
    reduction: str,
    workspace_mb: int,
    backend: str | None,
    num_valid: int | None = None,
) -> Inputs:
    """Checks the arguments of `projection_loss`, whose docstring describes them.

    Raises:
        ValueError, TypeError, BackendError: as `projection_loss` documents.
    """
    check_reduction(reduction, normalizer)
    check_tensor("student_hidden", student_hidden)
    check_tensor("teacher_hidden", teacher_hidden)
    teacher_hidden = teacher_hidden.detach()
    factors = tensors_of(projection)
    for index, factor in enumerate(factors):
        check_tensor("projection" if len(factors) == 1 else f"projection[{index}]", factor)
    if bias is not None:
        check_tensor("bias", bias)
    if factors:
        student_hidden, factors, bias = _cast(student_hidden, factors, bias)
    _check(student_hidden, teacher_hidden, factors, bias)
    lead = student_hidden.shape[:-1]
    check_row_tensor("mask", mask, lead, "student_hidden", student_hidden)
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(f"mask: expected torch.bool, got {mask.dtype}")
    check_row_tensor("token_weights", token_weights, lead, "student_hidden", student_hidden)
    check_workspace(workspace_mb)
    if num_valid is not None and mask is None:
        raise ValueError(f"num_valid: expected a mask to count, got num_valid={num_valid} alone")
    backend = dispatch.resolve(
        "projection_loss", student_hidden, teacher_hidden, *factors, backend=backend
    )

    student_hidden = student_hidden.reshape(math.prod(lead), student_hidden.shape[-1])
    teacher_hidden = teacher_hidden.reshape(math.prod(lead), teacher_hidden.shape[-1])
    mask = None if mask is None else mask.reshape(-1)
    dtype = torch.promote_types(student_hidden.dtype, torch.float32)
    weights = combine_row_weights(mask, token_weights, student_hidden, dtype)
    divisor = denominator(reduction, normalizer, mask, student_hidden, dtype)
    numbers = spec.numbers()
    if spec.loss == "relative":
        spec = dataclasses.replace(spec, loss="mse")
        energy = torch.ops.modxfer.projection_loss_energy(
            teacher_hidden, weights, numbers, spec.names(), backend
        )
        energy = energy / denominator("mean", None, mask, student_hidden, dtype)
        energy = torch.where(energy == 0, 1.0, energy)
        divisor = energy if divisor is None else divisor * energy
    if divisor is not None:
        weights = weights / divisor
    return Inputs(
        student_hidden,
        *(*factors, None, None)[:2],
        bias,
        teacher_hidden,
        mask,
        weights,
        numbers,
        spec.names(),
        num_valid,
        workspace_mb,
        backend,
    )


def tensors_of(projection: Tensor | tuple[Tensor, Tensor] | None) -> tuple[Tensor, ...]:
    """(), (P,) or (P_b, P_a)."""
    if projection is None:
        return ()
    if not isinstance(projection, (tuple, list)):
        return (projection,)
    if len(projection) != 2:
        raise ValueError(
            f"projection: expected a tensor or a pair (P_b, P_a), got {len(projection)} tensors"
        )
    return tuple(projection)


def _cast(hidden: Tensor, factors: tuple[Tensor, ...], bias: Tensor | None):
    """As `F.linear` would, but fp32 parameters stay: the op rounds them, and sums in fp32."""
    (cast,) = cast_for_autocast(hidden)
    if cast is hidden:
        return hidden, factors, bias

    def parameter(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or tensor.dtype in (torch.float32, torch.float64):
            return tensor
        return tensor.to(cast.dtype)

    return cast, tuple(parameter(factor) for factor in factors), parameter(bias)


def _check(student_hidden, teacher_hidden, factors, bias) -> None:
    for name, hidden in (("student_hidden", student_hidden), ("teacher_hidden", teacher_hidden)):
        check_float(name, hidden)
        if hidden.dim() == 0 or hidden.shape[-1] == 0:
            raise ValueError(
                f"{name}: expected shape [..., D] with D > 0, got {tuple(hidden.shape)}"
            )
    if student_hidden.shape[:-1] != teacher_hidden.shape[:-1]:
        raise ValueError(
            "teacher_hidden: expected the leading dimensions of student_hidden, "
            f"{tuple(student_hidden.shape[:-1])}, got {tuple(teacher_hidden.shape[:-1])}"
        )
    check_same_device("teacher_hidden", teacher_hidden, "student_hidden", student_hidden)
    d_s, d_t = student_hidden.shape[-1], teacher_hidden.shape[-1]
    if not factors:
        if d_s != d_t:
            raise ValueError(
                f"projection: expected shape ({d_t}, {d_s}) because the widths differ, got None"
            )
        if bias is not None:
            raise ValueError("bias: expected a projection to add to, got bias alone")
        return
    rank = factors[0].shape[1] if len(factors) == 2 and factors[0].dim() == 2 else "R"
    wanted = [(d_t, d_s)] if len(factors) == 1 else [(d_t, rank), (rank, d_s)]
    for index, (factor, shape) in enumerate(zip(factors, wanted, strict=True)):
        name = "projection" if len(factors) == 1 else f"projection[{index}]"
        if factor.dim() != 2 or 0 in factor.shape or tuple(factor.shape) != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {tuple(factor.shape)}")
        _check_parameter(name, factor, student_hidden)
    if bias is None:
        return
    if tuple(bias.shape) != (d_t,):
        raise ValueError(f"bias: expected shape ({d_t},), got {tuple(bias.shape)}")
    _check_parameter("bias", bias, student_hidden)


def _check_parameter(name: str, tensor: Tensor, hidden: Tensor) -> None:
    half = hidden.dtype in (torch.float16, torch.bfloat16)
    if tensor.dtype != hidden.dtype and not (half and tensor.dtype == torch.float32):
        expected = f"{hidden.dtype}, the dtype of student_hidden"
        raise TypeError(
            f"{name}: expected {expected}{', or torch.float32' if half else ''}, got {tensor.dtype}"
        )
    check_same_device(name, tensor, "student_hidden", hidden)

"""Checks of arguments that rooms share. Shapes always; values only where that costs no wait."""

import math

import torch
from torch import Tensor

from modxfer_fast.kernels import env
from modxfer_fast.kernels.common.scalars import check_integer

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensor(name: str, tensor: Tensor) -> None:
    """Raises TypeError for what is no dense tensor; an nn.Linear is not its weight."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.is_nested or tensor.layout is not torch.strided:
        kind = "a nested one" if tensor.is_nested else f"one of layout {tensor.layout}"
        raise TypeError(f"{name}: expected a dense tensor, got {kind}")


def check_tensors(**tensors: Tensor | None) -> None:
    """`check_tensor` of all that are given."""
    for name, tensor in tensors.items():
        if tensor is not None:
            check_tensor(name, tensor)


def check_constant(name: str, tensor: Tensor | None) -> None:
    """Raises ValueError for a tensor that wants a gradient, which none of the ops computes."""
    if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name}: expected a constant, got a tensor that requires a gradient, which the op "
            f"does not compute; pass {name}.detach()"
        )


def check_float(name: str, tensor: Tensor) -> None:
    check_tensor(name, tensor)
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{name}: expected a floating point tensor, got {tensor.dtype}")


def check_same_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(
            f"{name}: expected the device of {other_name}, {other.device}, got {tensor.device}"
        )


def check_row_tensor(
    name: str, tensor: Tensor | None, rows: tuple[int, ...], like_name: str, like: Tensor
) -> None:
    """One value a row: `tensor` has the shape `rows` and lies where `like` lies."""
    if tensor is None:
        return
    check_tensor(name, tensor)
    check_constant(name, tensor)
    if tuple(tensor.shape) != tuple(rows):
        raise ValueError(
            f"{name}: expected shape {tuple(rows)}, the leading dimensions of {like_name}, "
            f"got {tuple(tensor.shape)}"
        )
    check_same_device(name, tensor, like_name, like)


def check_labels(labels: Tensor | None, ce_weight: float, ignore_index: int) -> None:
    check_integer("ignore_index", ignore_index)
    if labels is None:
        if ce_weight != 0.0:
            raise ValueError(
                f"labels: expected a tensor because ce_weight is {ce_weight}, got None"
            )
        return
    check_tensor("labels", labels)
    if labels.dtype != torch.int64:
        raise TypeError(f"labels: expected torch.int64, got {labels.dtype}")


def check_label_values(
    labels: Tensor | None, ignore_index: int, vocab_size: int, name: str = "labels"
) -> None:
    """Labels in [0, vocab_size) or ignore_index; on a GPU only under MODXFER_DEBUG=1."""
    if labels is None or labels.numel() == 0 or not (labels.device.type == "cpu" or env.debug()):
        return
    bad = (labels != ignore_index) & ((labels < 0) | (labels >= vocab_size))
    if bad.any():
        raise ValueError(
            f"{name}: expected values in [0, {vocab_size}) or ignore_index={ignore_index}, "
            f"got {labels[bad][0].item()}"
        )


def check_temperatures(softening: Tensor | None, valid: Tensor | None) -> None:
    """Raises ValueError for a temperature that is not positive and finite; on a GPU only under
    MODXFER_DEBUG=1, where it makes the loss of its token NaN, infinite or meaningless.

    Args:
        softening: [N, 2], as `KDSpec.softened` makes it.
        valid: [N] bool, rows that count; the others may hold anything.
    """
    if softening is None or not (softening.device.type == "cpu" or env.debug()):
        return
    temperature = softening[:, 0]
    bad = ~((temperature > 0.0) & (temperature < math.inf))
    if valid is not None:
        bad &= valid
    if bad.any():
        raise ValueError(
            f"temperature: expected positive numbers, got {temperature[bad][0].item()}"
        )


def debug_check_finite(**tensors: Tensor | None) -> None:
    """Under MODXFER_DEBUG=1, raises ValueError for the first tensor that holds a NaN."""
    if not env.debug():
        return
    for name, tensor in tensors.items():
        if tensor is not None and tensor.isnan().any():
            raise ValueError(f"{name}: expected no NaN, got {int(tensor.isnan().sum())} of them")


def check_num_valid(
    num_valid: int | torch.SymInt | None, valid: Tensor | None, counted: str
) -> None:
    """num_valid counts what is True in `valid`; checked where counting costs no wait.

    Args:
        counted: what an error calls it.
    """
    if num_valid is None or valid is None or not (valid.device.type == "cpu" or env.debug()):
        return
    count = int(valid.sum())
    if num_valid != count:
        raise ValueError(f"num_valid: expected {count}, {counted}, got {num_valid}")

"""How wrong a kernel may be: twice plain PyTorch's own error and a rounding of what was summed."""

import torch
from torch import Tensor


def assert_within_budget(
    kernel: Tensor, truth: Tensor, yardstick: Tensor, name: str, scale: float = 0.0
) -> None:
    """The largest error of `kernel` is at most 2 (error of `yardstick` + eps max(scale, |truth|)).

    Args:
        truth: the reference in fp64 on the same, already rounded inputs.
        yardstick: plain PyTorch with the kernel's own input, accumulation and output types.
        scale: largest magnitude that goes through the sum; without it a yardstick that is right by
            luck makes a sound kernel fail.

    Raises:
        AssertionError: another shape, another mask of infinities, NaN, or an error over budget.
    """
    assert kernel.shape == truth.shape, f"{name}: {tuple(kernel.shape)} != {tuple(truth.shape)}"
    infinite = truth.isinf()
    assert torch.equal(kernel.double()[infinite], truth[infinite]), f"{name}: infinities differ"
    kernel, truth, yardstick = (t[~infinite] for t in (kernel, truth, yardstick))
    if truth.numel() == 0:
        return
    assert torch.isfinite(kernel).all(), f"{name}: non-finite"
    band = torch.finfo(kernel.dtype).eps * max(scale, truth.abs().max().item())
    budget = 2 * ((yardstick.double() - truth).abs().max().item() + band)
    error = (kernel.double() - truth).abs().max().item()
    assert error <= budget, f"{name}: error {error:.2e} over budget {budget:.2e}"

"""Features of two models for the tests of room `correlation` and of the moments made of it."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

# what the sizes of GPU tests are divided by on a CPU
PART = {"cpu": 16, "cuda": 1}


def features(
    n: int,
    width: int,
    dtype: torch.dtype = torch.float32,
    *,
    mean: float = 3.0,
    source: Tensor | None = None,
    seed: int = 0,
) -> Tensor:
    """[n, width] of many scales and means, correlated with the columns of `source`, [n, any]."""
    generator = torch.Generator().manual_seed(seed)
    randn = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)
    values = randn(n, width)
    if source is not None:
        values = 0.5 * values + source[:, torch.arange(width) % source.shape[1]]
    return (values * torch.logspace(-2, 1, width).double() + mean * randn(width)).to(dtype)


def pair(n: int, dtype: torch.dtype = torch.float32, widths=(40, 70), mean: float = 3.0):
    source = torch.randn(n, 11, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return tuple(
        features(n, width, dtype, mean=mean, source=source, seed=seed)
        for seed, width in enumerate(widths)
    )


def rows(n: int, width: int, dtype: torch.dtype, seed: int, device: str) -> Tensor:
    """[n, width] with a mean of 5 and three columns that every seed shares."""
    generators = [torch.Generator(device).manual_seed(value) for value in (seed, 9)]
    own = torch.randn(n, width, device=device, generator=generators[0])
    shared = torch.randn(n, 3, device=device, generator=generators[1])
    return (own + shared[:, torch.arange(width, device=device) % 3] + 5.0).to(dtype)


def device_rows(n: int, widths: tuple[int, int], dtype: torch.dtype, device: str):
    """`rows` x and y for a GPU test, and a mask that counts three of four of them."""
    n, *widths = (-(-size // PART[device]) for size in (n, *widths))
    x, y = (rows(n, width, dtype, seed, device) for seed, width in enumerate(widths))
    return x, y, torch.arange(n, device=device) % 4 != 1


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """GEMMs outside our kernels may or may not use TF32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def assert_moments(
    x: Tensor, y: Tensor, count: int | Tensor, correlation: Tensor, cov_xx: Tensor, cov_yy: Tensor
) -> None:
    """They are those of the rows x and y, all of which counted."""
    assert count == len(x)
    d_x, joint = x.shape[1], torch.cat([x, y], 1).double().t()
    truth, cov = torch.corrcoef(joint), torch.cov(joint, correction=0)
    assert (correlation - truth[:d_x, d_x:]).abs().max() < 2e-6
    for result, wanted in ((cov_xx, cov[:d_x, :d_x]), (cov_yy, cov[d_x:, d_x:])):
        assert (result - wanted).abs().max() < 2e-6 * cov.diagonal().max()

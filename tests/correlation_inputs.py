"""Features of two models for the tests of room `correlation` and of the moments made of it."""

import torch
from torch import Tensor


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

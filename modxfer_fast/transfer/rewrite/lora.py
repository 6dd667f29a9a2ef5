"""LoRA through maps.

A_s = A_t read^T [r, d_s]        B_s = write^T B_t [d_s, r]

so the student's update of its own features is the mapped update of what the teacher would have
read. A plain LoRA has no constant term, and what the means add is dropped; maps fitted with
`means=False`, as `fit_maps` does for it, are the best ones without it. With lora_bias it is kept:
b_s = write^T (b_t + B_t A_t offset).

Directions that say nothing, as those by which a rank is raised, have B = 0 and a random A, as PEFT
begins: with both at 0 neither would ever have a gradient.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from modxfer_fast.transfer.errors import TransferError
from modxfer_fast.transfer.maps.moment_views import uncentred
from modxfer_fast.transfer.maps.numerics import inverse_or_zero
from modxfer_fast.transfer.rewrite.source import Source

A, B, BIAS = "lora_A.weight", "lora_B.weight", "lora_B.bias"
_ROUNDING = 1e-12


def rewrite_lora(
    sources: Sequence[Source], combine: str, *, rank: int | None, on_features: bool, seed: int = 0
) -> dict[str, Tensor]:
    """The student's tensors, fp64, to be scaled as the first source is.

    Args:
        combine: "single", "mean" and "reference_avg" add factors; "mean_product" adds products and
            factors them again.
        rank: of the result, to which the combined update is factored again; None: that of the
            first source.
        on_features: of all updates of that rank take the one whose output on the student's own
            features comes closest to the (weighted) sum of the mapped updates.
        seed: of the rows of A in directions that say nothing.

    Raises:
        TransferError: factors of different ranks are to be averaged, or moments are missing.
    """
    factors = [_mapped(source, sources[0].scaling) for source in sources]
    weights = [source.weight for source in sources]
    wanted = factors[0][A].shape[0] if rank is None else rank
    ranks = {parts[A].shape[0] for parts in factors}
    add_products = on_features or combine == "mean_product"
    if add_products:
        ups = [weight * parts[B] for weight, parts in zip(weights, factors, strict=True)]
        up, down = torch.cat(ups, 1), torch.cat([parts[A] for parts in factors])
    elif len(ranks) > 1:
        raise TransferError(
            f"layer_map: expected one rank for {combine!r}, got the ranks {sorted(ranks)}; "
            "'mean_product' averages modules of different ranks"
        )
    else:
        up, down = (_sum(weights, [parts[name] for parts in factors]) for name in (B, A))
    if add_products or ranks != {wanted}:
        up, down = truncated(up, down, wanted, _gram(sources[0]) if on_features else None)
    result = {A: _trainable(down, up, seed), B: up}
    if BIAS in factors[0]:
        result[BIAS] = _sum(weights, [parts[BIAS] for parts in factors])
    return result


def truncated(
    up: Tensor, down: Tensor, rank: int, gram: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """B [n, rank] and A [rank, m] with B A closest to up @ down, of equal size in each direction.

    Closest in the Frobenius norm of (up down - B A) gram^(1/2); gram None is the identity. The
    optimum is P P^T up down with P the leading left singular vectors of up down gram^(1/2).
    Directions that it does not need are 0 in both.
    """
    q, r = torch.linalg.qr(up)  # up = q r; the products below have the small inner width
    metric = down @ down.T if gram is None else down @ gram @ down.T
    values, vectors = torch.linalg.eigh(metric)
    left, _, _ = torch.linalg.svd(r @ vectors * values.clamp(min=0).sqrt(), full_matrices=False)
    p = q @ left[:, :rank]
    a = p.T @ up @ down
    size = a.norm(dim=1)
    # rounding of a direction that is not there would be small in both, and so hardly train
    size = torch.where(size > _ROUNDING * size.max(), size, 0.0).sqrt()
    a, b = a * inverse_or_zero(size)[:, None], p * size
    missing = rank - p.shape[1]
    if missing > 0:
        a = torch.cat((a, a.new_zeros(missing, a.shape[1])))
        b = torch.cat((b, b.new_zeros(b.shape[0], missing)), 1)
    return b, a


def _trainable(down: Tensor, up: Tensor, seed: int) -> Tensor:
    """A with random rows, uniform as in `reset_lora_parameters` of PEFT, where both are 0."""
    idle = ~(down.any(1) | up.any(0))
    generator = torch.Generator().manual_seed(seed)
    fresh = torch.rand(down.shape, generator=generator, dtype=down.dtype) * 2 - 1
    return torch.where(idle[:, None], fresh / math.sqrt(down.shape[1]), down)


def _mapped(source: Source, scaling: float) -> dict[str, Tensor]:
    tensors, read, write = source.tensors, source.read, source.write
    ratio = source.scaling / scaling
    parts = {A: read.read_weight(tensors[A]), B: write.write_weight(tensors[B]) * ratio}
    if BIAS in tensors:
        constant = tensors[B].double() @ (tensors[A].double() @ read.offset)
        parts[BIAS] = write.write_weight(tensors[BIAS].double() + constant) * ratio
    return parts


def _gram(source: Source) -> Tensor:
    """Second moments of the student's own features about 0: a LoRA sees them with their mean."""
    if source.moments is None or source.moments.cov_xx is None:
        raise TransferError(
            "statistics: expected with the method 'reduced_rank', with the Gram matrices of the "
            "student's features; got none"
        )
    return uncentred(source.moments).cov_xx


def _sum(weights: Sequence[float], tensors: Sequence[Tensor]) -> Tensor:
    # a single source stays bit-equal: 1 * x + nothing
    total = weights[0] * tensors[0]
    for weight, tensor in zip(weights[1:], tensors[1:], strict=True):
        total = total + weight * tensor
    return total

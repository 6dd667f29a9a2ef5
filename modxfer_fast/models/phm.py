"""Linear maps that are sums of Kronecker products (parameterised hypercomplex multiplication).

n terms   r rank   k = in / n   o = out / n
H [in, out] = sum_i kron(rule_i, left_i @ right_i)      y = x @ H + bias
rule [n, n, n]   left [n, k, r]   right [n, r, o]
Row a * k + p of H belongs to block a, offset p; columns likewise (Karimi Mahabadi et al. 2021,
equation 4).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from modxfer_fast.errors import ModelError

# a sweep that gains less than this part of the residual is the last one
_STANDS_STILL = 1e-4
# a residual under this is rounding
_EXACT = 1e-6


class PhmFit(NamedTuple):
    """Factors of the fit, and |H - fit| / |H| in the Frobenius norm."""

    left: Tensor  # [n, k, r]
    right: Tensor  # [n, r, o]
    residual: float


class PhmLinear(nn.Module):
    """y = x @ H + bias without ever forming H: 3 small products, of n * r inner width.

    Args:
        in_features, out_features: multiples of `phm_dim`.
        phm_dim: n.
        rank: r.
        rule_std: standard deviation of a rule of its own; None where the rule comes with the call.
    Raises:
        ModelError: a width that `phm_dim` does not divide.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        phm_dim: int,
        rank: int,
        rule_std: float | None = None,
    ):
        super().__init__()
        check_phm_dim(phm_dim, input=in_features, output=out_features)
        self.left = nn.Parameter(torch.empty(phm_dim, in_features // phm_dim, rank))
        self.right = nn.Parameter(torch.empty(phm_dim, rank, out_features // phm_dim))
        self.bias = nn.Parameter(torch.zeros(out_features))
        for factor in (self.left, self.right):
            for term in factor:
                nn.init.xavier_uniform_(term)
        rule = None if rule_std is None else nn.Parameter(phm_rule(phm_dim, rule_std))
        self.register_parameter("rule", rule)

    def forward(self, x: Tensor, rule: Tensor | None = None) -> Tensor:
        """x [..., in] -> [..., out]; rule [n, n, n], where this layer has none of its own."""
        rule = self.rule if rule is None else rule
        n, k, r = self.left.shape
        # kron(rule_i, L_i R_i): every block of x through L_i, blocks mixed by rule_i, then R_i
        blocks = x.unflatten(-1, (n, k))
        inner = blocks @ self.left.transpose(0, 1).reshape(k, n * r)  # [..., block, (i, r)]
        inner = torch.einsum("...air,iab->...bir", inner.unflatten(-1, (n, r)), rule)
        y = inner.flatten(-2) @ self.right.reshape(n * r, -1)  # [..., block, o]
        return y.flatten(-2) + self.bias


def check_phm_dim(phm_dim: int, **widths: int) -> None:
    """Raise a ModelError unless `phm_dim` divides every one of the named widths."""
    for name, width in widths.items():
        if width % phm_dim:
            raise ModelError(
                f"phm_dim: expected a divisor of the {name} width {width}, got {phm_dim}"
            )


def phm_rule(phm_dim: int, std: float) -> Tensor:
    """Fresh rules [n, n, n], N(0, std)."""
    return torch.empty(phm_dim, phm_dim, phm_dim).normal_(std=std)


def phm_dense(rule: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """H [in, out] of rule [n, n, n], left [n, k, r] and right [n, r, o], in their dtype.

    Raises:
        ModelError: shapes that do not belong together.
    """
    n = _check_rule(rule)
    if left.ndim != 3 or right.ndim != 3 or left.shape[::2] != (n, right.shape[1]):
        raise ModelError(
            f"left, right: expected [{n}, in/{n}, r] and [{n}, r, out/{n}], "
            f"got {list(left.shape)} and {list(right.shape)}"
        )
    if right.shape[0] != n:
        raise ModelError(f"right: expected {n} terms as in the rule, got {right.shape[0]}")
    dense = torch.einsum("iab,ipr,irq->apbq", rule, left, right)
    return dense.flatten(2, 3).flatten(0, 1)


def phm_refit(dense: Tensor, rule: Tensor, rank: int, *, sweeps: int = 30) -> PhmFit:
    """The sum of Kronecker products with this rule that is near a dense map.

    The terms W_i of full rank are a linear least-squares problem; each is then cut to `rank` by an
    SVD. Rules are not orthogonal, so cutting one term at a time is not the best of that rank: at
    most `sweeps` of least squares, for the left factors given the right ones and back, come nearer,
    until the residual stands still.

    Args:
        dense: H [in, out].
        rule: [n, n, n], kept as it is.
    Returns:
        Factors in float64 on the device of `dense`, and the relative residual (0 where H is 0).
    Raises:
        ModelError: a shape or rank that does not fit.
    """
    n = _check_rule(rule)
    if rank < 1:
        raise ModelError(f"rank: expected at least 1, got {rank}")
    rule = rule.detach().to(dense.device, torch.float64)
    blocks = _blocks(dense, n)
    k, o = blocks.shape[2:]
    norm = blocks.norm().item()
    if norm == 0:
        left, right = blocks.new_zeros(n, k, rank), blocks.new_zeros(n, rank, o)
        return PhmFit(left, right, 0.0)
    # a fresh rule is near 1e-4; its inverse is taken at size 1, the factors carry the scale
    scale = rule.abs().max().item() or 1.0
    rule = rule / scale
    inverse = torch.linalg.pinv(rule.reshape(n, n * n).T)  # [i, (a, b)]
    best = _cut((inverse @ blocks.reshape(n * n, k * o)).reshape(n, k, o), rank)
    residual = _residual(blocks, rule, *best)
    for _ in range(sweeps):
        left, right = _sweep(blocks, rule, *best)
        before, after = residual, _residual(blocks, rule, left, right)
        if after < before:
            best, residual = (left, right), after
        if after > before * (1 - _STANDS_STILL):
            break
    left, right = _cut(best[0] @ best[1], rank)
    return PhmFit(left / scale**0.5, right / scale**0.5, residual / norm)


def phm_refit_rule(
    dense: Sequence[Tensor], rule: Tensor, rank: int, *, sweeps: int = 100
) -> tuple[Tensor, list[PhmFit]]:
    """One rule for several dense maps, and the factors of each with it, near to all of them.

    `sweeps` of least squares go on from what `phm_refit` finds with the given rule: the rule given
    all terms W_i = left_i right_i, then the factors. Every map counts alike, whatever its norm.

    Args:
        dense: H [in, out], each of its own widths.
        rule: [n, n, n], where the search begins.
    Returns:
        The rule and a fit for each map, in float64. A rule that serves all of them is kept as it
        is; another has terms of equal size and is as large as the one before.
    Raises:
        ModelError: as `phm_refit`.
    """
    units = [each.double().norm().item() or 1.0 for each in dense]
    dense = [each.double() / unit for each, unit in zip(dense, units, strict=True)]
    fits = [phm_refit(each, rule, rank) for each in dense]
    n = len(rule)
    blocks = [_blocks(each, n) for each in dense]
    flat = torch.cat([each.reshape(n * n, -1) for each in blocks], 1)
    best, factors = rule.detach().to(flat), [(fit.left, fit.right) for fit in fits]
    size, residuals = best.norm() / n**0.5, [fit.residual for fit in fits]
    for _ in range(sweeps if max(residuals) > _EXACT else 0):
        terms = torch.cat([(left @ right).flatten(1) for left, right in factors], 1)
        inverse = torch.linalg.pinv(terms @ terms.T, hermitian=True)
        turned = (inverse @ terms @ flat.T).reshape(n, n, n)
        # terms of equal size: none is left behind where training goes on
        norms = turned.flatten(1).norm(dim=1)
        turned = turned * torch.where(norms > 0, size / norms, 1.0)[:, None, None]
        swept = [_sweep(each, turned, *pair) for each, pair in zip(blocks, factors, strict=True)]
        new = [_residual(each, turned, *pair) for each, pair in zip(blocks, swept, strict=True)]
        before, after = math.hypot(*residuals), math.hypot(*new)
        if after < before:
            best, factors, residuals = turned, swept, new
        if after > before * (1 - _STANDS_STILL):
            break
    return best, [
        PhmFit(*_cut(unit * left @ right, rank), residual)
        for (left, right), unit, residual in zip(factors, units, residuals, strict=True)
    ]


def _blocks(dense: Tensor, n: int) -> Tensor:
    """H as [a, b, p, q]: n by n blocks of k by o."""
    if dense.ndim != 2 or dense.shape[0] % n or dense.shape[1] % n:
        raise ModelError(
            f"dense: expected [in, out] with multiples of {n}, got {list(dense.shape)}"
        )
    k, o = dense.shape[0] // n, dense.shape[1] // n
    return dense.detach().double().reshape(n, k, n, o).transpose(1, 2)


def _cut(terms: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors [n, k, r] and [n, r, o] of equal size, nearest to each of the terms [n, k, o]."""
    u, s, vh = torch.linalg.svd(terms, full_matrices=False)
    kept = min(rank, s.shape[-1])
    root = s[:, :kept].sqrt()
    left, right = u[..., :kept] * root[:, None], root[..., None] * vh[:, :kept]
    missing = rank - kept
    return nn.functional.pad(left, (0, missing)), nn.functional.pad(right, (0, 0, 0, missing))


def _sweep(blocks: Tensor, rule: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Best left factors for these right ones, then best right factors for those."""
    overlap = torch.einsum("iab,jab->ij", rule, rule)
    projected = torch.einsum("iab,abpq->ipq", rule, blocks)  # [n, k, o]
    n, k, r = left.shape
    gram = torch.einsum("ij,isq,jrq->isjr", overlap, right, right).reshape(n * r, n * r)
    target = torch.einsum("ipq,irq->pir", projected, right).reshape(k, n * r)
    left = (target @ torch.linalg.pinv(gram, hermitian=True)).reshape(k, n, r).transpose(0, 1)
    gram = torch.einsum("ij,ips,jpr->isjr", overlap, left, left).reshape(n * r, n * r)
    target = torch.einsum("ipr,ipq->irq", left, projected).reshape(n * r, -1)
    return left, (torch.linalg.pinv(gram, hermitian=True) @ target).reshape(n, r, -1)


def _residual(blocks: Tensor, rule: Tensor, left: Tensor, right: Tensor) -> float:
    fit = torch.einsum("iab,ipr,irq->abpq", rule, left, right)
    return (blocks - fit).norm().item()


def _check_rule(rule: Tensor) -> int:
    if rule.ndim != 3 or len(set(rule.shape)) != 1:
        raise ModelError(f"rule: expected [n, n, n], got {list(rule.shape)}")
    return rule.shape[0]

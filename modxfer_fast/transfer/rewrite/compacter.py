"""Compacters through maps: dense, mapped as bottlenecks, and factored again with the same rule.

H_down [d, b] and H_up [b, d] are sums of Kronecker products; the mapped matrices in general are
not, so the factors are refitted by least squares and what is lost is reported.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor

from modxfer_fast.models.compacter import phm_dense, phm_refit
from modxfer_fast.transfer.errors import TransferError
from modxfer_fast.transfer.rewrite.bottleneck import rewrite_bottleneck
from modxfer_fast.transfer.rewrite.source import Source


def rewrite_compacter(
    sources: Sequence[Source], combine: str
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The student's left, right, bias and rule of both projections; relative residuals of the fit.

    Rules are those of the first source.

    Raises:
        TransferError: a width that the number of terms does not divide.
    """
    dense = [source._replace(tensors=_dense(source.tensors)) for source in sources]
    mapped = rewrite_bottleneck(dense, combine)
    first = sources[0].tensors
    result, residuals = {}, {}
    for part in ("down", "up"):
        rule = _rule(first, part)
        weight = mapped[f"{part}.weight"].T
        if any(width % len(rule) for width in weight.shape):
            raise TransferError(
                f"phm_dim: expected a divisor of the student's widths {list(weight.shape)}, "
                f"got {len(rule)}"
            )
        fit = phm_refit(weight, rule, first[f"{part}.left"].shape[2])
        result[f"{part}.left"], result[f"{part}.right"] = fit.left, fit.right
        result[f"{part}.bias"] = mapped[f"{part}.bias"]
        if f"{part}.rule" in first:
            result[f"{part}.rule"] = first[f"{part}.rule"]
        residuals[f"residual_{part}"] = fit.residual
    if "rule" in first:
        result["rule"] = first["rule"]
    return result, residuals


def _rule(tensors: Mapping[str, Tensor], part: str) -> Tensor:
    return tensors["rule"] if "rule" in tensors else tensors[f"{part}.rule"]


def _dense(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    parts = {}
    for part in ("down", "up"):
        factors = (_rule(tensors, part), tensors[f"{part}.left"], tensors[f"{part}.right"])
        parts[f"{part}.weight"] = phm_dense(*(factor.double() for factor in factors)).T
        parts[f"{part}.bias"] = tensors[f"{part}.bias"]
    return parts

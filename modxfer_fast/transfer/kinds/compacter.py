"""Compacters through maps: dense, mapped as bottlenecks, and factored again.

H_down [d, b] and H_up [b, d] are sums of Kronecker products; the mapped matrices in general are
not. Rules and factors are refitted by least squares, a shared rule to all projections together, and
what is lost is reported.
"""

from collections.abc import Mapping

from torch import Tensor

from modxfer_fast.models.phm import phm_dense, phm_refit_rule
from modxfer_fast.transfer.errors import TransferError
from modxfer_fast.transfer.kinds.base import Slot
from modxfer_fast.transfer.kinds.bottleneck import UP, Bottleneck

_PARTS = ("down", "up")


class Compacter(Bottleneck):
    """Bottleneck adapters whose projections are sums of Kronecker products."""

    name = "compacter"
    prefix = "compacter_"
    tensors = r"compacter_(?:down|up)\.(?:left|right|bias|rule)|compacter_rule"

    def rewrite(self, sources, combine, **options):
        """Those of a bottleneck, with dense weights, and the rules of the first source."""
        first = sources[0].tensors
        rules = {name: tensor for name, tensor in first.items() if name.endswith("rule")}
        dense = [source._replace(tensors=_dense(source.tensors)) for source in sources]
        return {**super().rewrite(dense, combine), **rules}

    def factored(self, config, slots):
        """left, right, bias and rule of both projections, and relative residuals of the fits."""
        places = [(slot, part) for slot in slots for part in _PARTS]
        is_shared = "rule" in next(iter(slots.values()))
        result: dict[Slot, dict[str, Tensor]] = {slot: {} for slot in slots}
        residuals: dict[Slot, dict[str, float]] = {slot: {} for slot in slots}
        for together in [places] if is_shared else [[place] for place in places]:
            weights = [slots[slot][f"{part}.weight"].T for slot, part in together]
            slot, part = together[0]
            rule = _rule(slots[slot], part)
            for weight in weights:
                if any(width % len(rule) for width in weight.shape):
                    raise TransferError(
                        "phm_dim: expected a divisor of the student's widths "
                        f"{list(weight.shape)}, got {len(rule)}"
                    )
            rule, fits = phm_refit_rule(weights, rule, config.phm_rank)
            for (slot, part), fit in zip(together, fits, strict=True):
                result[slot] |= {
                    f"{part}.left": fit.left,
                    f"{part}.right": fit.right,
                    f"{part}.bias": slots[slot][f"{part}.bias"],
                    "rule" if is_shared else f"{part}.rule": rule,
                }
                residuals[slot][f"residual_{part}"] = fit.residual
        return result, residuals

    def update(self, source):
        return _dense(source.tensors)[UP].double(), None


def _rule(tensors: Mapping[str, Tensor], part: str) -> Tensor:
    return tensors["rule"] if "rule" in tensors else tensors[f"{part}.rule"]


def _dense(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    dense = {name: tensor for name, tensor in tensors.items() if name.endswith("bias")}
    for part in _PARTS:
        factors = (_rule(tensors, part), tensors[f"{part}.left"], tensors[f"{part}.right"])
        dense[f"{part}.weight"] = phm_dense(*(factor.double() for factor in factors)).T
    return dense

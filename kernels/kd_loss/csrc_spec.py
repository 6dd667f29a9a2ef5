"""A spec as csrc reads it: the arguments of its class Spec (csrc/include/modxfer/kd_spec.h)."""

from modxfer_fast.kernels.common import KDSpec
from modxfer_fast.kernels.divergences import DIVERGENCES

# modxfer::Divergence
_IDS = {name: index for index, name in enumerate(DIVERGENCES)}


def scalars(spec: KDSpec) -> tuple[list[int], list[float]]:
    """Its divergences, and its numbers."""
    numbers = [float(spec.temperature), spec.kd_weight, *hard_scalars(spec)]
    for record, weight in spec.parts:
        own = record.parameters(spec.alpha, spec.beta)
        numbers += [weight, *record.kernel_constants(*own)]
    return [_IDS[record.name] for record, _ in spec.parts], numbers


def hard_scalars(spec: KDSpec) -> tuple[float, float, float]:
    """Those of the terms that need no teacher."""
    return spec.ce_weight, spec.label_smoothing, spec.z_loss_weight

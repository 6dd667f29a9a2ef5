"""Logits of a model from those of its head, as the Triton row kernels load and write them.

`BEND` is what `bend_constants` makes of a `Bend`: None where nothing is done, which adds no
instruction, or constants of the compiled kernel, (scale, cap) with cap 0 for none.
"""

import math

import triton
import triton.language as tl

from modxfer_fast.kernels.common.bend import Bend

_LOG2E_2 = tl.constexpr(2.0 * math.log2(math.e))


def bend_constants(bend: Bend) -> tuple[float, float] | None:
    """What row kernels take as `BEND`."""
    return None if bend.is_straight else bend.numbers()


@triton.jit
def _tanh(x):
    """To 3 ulp; exactly +-1 beyond 10.

    Least maximum error polynomial of (tanh(x) / x - 1) / x^2 where 1 - e^-2x would cancel.
    """
    size = tl.abs(x)
    s = x * x
    y = -0.00609671417
    y = y * s + 0.020997179
    y = y * s - 0.0538509096
    y = y * s + 0.133327697
    y = y * s - 0.333333289
    e = tl.exp2(-size * _LOG2E_2)
    large = (1.0 - e) / (1.0 + e)
    return tl.where(size < 0.625, x + x * (s * y), tl.where(x < 0.0, -large, large))


@triton.jit
def bend(raw, BEND: tl.constexpr):
    """z of raw logits; an infinite one stays what it is."""
    if BEND is None:
        return raw
    else:
        if BEND[1] == 0.0:
            z = raw * BEND[0]
        else:
            is_infinite = tl.abs(raw) == float("inf")
            z = tl.where(is_infinite, raw, BEND[1] * _tanh(raw * (BEND[0] / BEND[1])))
        return z


@triton.jit
def unbend(gradient, z, BEND: tl.constexpr):
    """The gradient in the raw logits of one in z."""
    if BEND is None:
        return gradient
    else:
        slope = BEND[0]
        if BEND[1] != 0.0:
            # bounded, because an excluded class has z = -inf and no gradient
            t = tl.minimum(tl.maximum(z * (1.0 / BEND[1]), -1.0), 1.0)
            slope = BEND[0] * (1.0 - t * t)
        return gradient * slope

from modxfer_fast.kernels.correlation.moments import Moments, StreamingMoments
from modxfer_fast.kernels.correlation.op import (
    accumulate_centred,
    accumulate_gram,
    accumulate_product,
)

__all__ = [
    "Moments",
    "StreamingMoments",
    "accumulate_centred",
    "accumulate_gram",
    "accumulate_product",
]

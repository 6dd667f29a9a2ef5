from .moments import Moments, StreamingMoments
from .op import accumulate_centred, accumulate_gram, accumulate_product

__all__ = [
    "Moments",
    "StreamingMoments",
    "accumulate_centred",
    "accumulate_gram",
    "accumulate_product",
]

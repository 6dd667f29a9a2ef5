from modxfer_fast.kernels.correlation.op import (
    correlation_centre,
    correlation_gram,
    correlation_product,
)

__all__ = ["correlation_centre", "correlation_gram", "correlation_product"]

"""Classes of a chunk of rows whose dlogits are next to nothing take no part in its gradients.

    class j is left out of a chunk where |dlogits_nj| < eps |w_n| for each of its rows n,
    in fact < eps min |w_n|, w_n the factor of the row in the loss, 1 / N in a plain mean

The products dhidden = dlogits W and dweight = dlogits^T hidden then run over the other classes,
gathered. What each gradient may lack, with sums over what is left out, is bounded by

    dhidden_n   eps |w_n| sum_j |W_j|        dweight_j   eps sum_n |w_n| |hidden_n|

The loss itself is exact. The gradient filter of Cut Cross-Entropy (Wijmans et al. 2025, arXiv
2411.09009) skips blocks of rows and classes below 2^-12. Here columns of a chunk are gathered: of
the rows of a chunk each looks at other classes, and a block of neighbours is seldom empty.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from modxfer_fast.kernels.common.composed_head import of_classes

_MOST = 0.5  # of the classes; beyond, to gather them costs more than their products


class ClassFilter(NamedTuple):
    """eps: in units of the row's factor; see above."""

    eps: float

    def active(self, dlogits: Tensor, head: Any, row_weights: Tensor) -> tuple[Tensor, Any]:
        """dlogits [m, A] and the head of the A classes that count, or all of both as they are.

        A GPU waits for their number. NaN counts.
        """
        factors = row_weights.abs()
        least = factors.masked_fill(factors == 0, torch.inf).min()
        size = torch.maximum(dlogits.amax(0), -dlogits.amin(0))
        classes = (~(size < self.eps * least)).nonzero().squeeze(1)
        if classes.numel() > _MOST * dlogits.shape[1]:
            return dlogits, head
        return dlogits.index_select(1, classes), of_classes(head, classes)

    def row_bytes(self, student: Any, dtype: torch.dtype) -> int:
        """Of dlogits that are gathered."""
        return int(_MOST * student.vocab_size) * dtype.itemsize

    def widened_bytes(self, student: Any, dtype: torch.dtype) -> int:
        """Of a row of the head's tiles, which are gathered."""
        ids = torch.empty(0, dtype=torch.int64)
        return of_classes(student, ids).widened_bytes(dtype)

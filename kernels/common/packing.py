"""Rows that count, taken out before a GEMM and put back behind it.

A CPU counts them, and a GPU is told their number (`num_valid`). A GPU that is not runs every row:
it would have to wait for the count, and a product cannot be made shorter without it. Rows that do
not count then have no weight and states of 0, because 0 * NaN would reach a parameter's gradient.
"""

import torch
from torch import Tensor


def runs_ignored_rows(valid: Tensor | None, num_valid: int | torch.SymInt | None) -> bool:
    """Whether rows that do not count are run beside the others; arguments as of `kept_rows`."""
    return valid is not None and num_valid is None and valid.is_cuda


def kept_rows(valid: Tensor | None, num_valid: int | torch.SymInt | None) -> Tensor | None:
    """Indices of the rows that count, or None where all rows are run.

    Args:
        valid: [N] bool, None when every row counts.
        num_valid: how many are True, where the caller knows it on the host.
    """
    if valid is None or runs_ignored_rows(valid, num_valid):
        return None
    if num_valid is not None:
        if num_valid == valid.shape[0]:
            return None
        return torch.nonzero_static(valid, size=num_valid, fill_value=0).squeeze(1)
    kept = valid.nonzero().squeeze(1)
    return None if kept.shape[0] == valid.shape[0] else kept


def take(tensor: Tensor, span: slice, index: Tensor | None) -> Tensor:
    """Rows `span` of a tensor, or those that `index`, the kept rows of the span, names."""
    return tensor[span] if index is None else tensor.index_select(0, index)


def put(out: Tensor, span: slice, index: Tensor | None, values: Tensor) -> None:
    """The inverse of `take`: rows of `out` receive `values`."""
    if index is None:
        out[span] = values
    else:
        out.index_copy_(0, index, values)


def row_major(rows: Tensor) -> Tensor:
    """Kernels take any row stride but contiguous rows."""
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()

"""The room's loop over blocks with the cuda row kernels."""

import functools

from modxfer_fast.kernels.kd_loss import cuda_impl as rows
from modxfer_fast.kernels.relation_loss.stream import stream

available = rows.available
supports = rows.supports
relation_loss_fwd = functools.partial(stream, rows)

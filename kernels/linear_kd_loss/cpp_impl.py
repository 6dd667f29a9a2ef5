"""The room's loop over chunks with the cpp row kernels."""

import functools

from modxfer_fast.kernels.kd_loss import cpp_impl as rows
from modxfer_fast.kernels.linear_kd_loss.stream import stream

available = rows.available
supports = rows.supports
linear_kd_loss_fwd = functools.partial(stream, rows)

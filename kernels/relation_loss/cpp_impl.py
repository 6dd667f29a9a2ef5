"""The room's loop over blocks with the C++ row kernels."""

import functools

from modxfer_fast.kernels.kd_loss import cpp_impl as rows
from modxfer_fast.kernels.relation_loss.stream import stream

available = rows.available
supports = rows.supports
relation_loss_fwd = functools.partial(stream, rows)

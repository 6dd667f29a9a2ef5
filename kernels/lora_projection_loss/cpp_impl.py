"""The linear by C++ kernels; a block of rows, or a GEMM, reads its output for the loss."""

import functools

from modxfer_fast.kernels.lora_linear import cpp_impl as linear
from modxfer_fast.kernels.lora_projection_loss.linear import linear_alone

available = linear.available
supports = linear.supports
lora_projection_loss_linear = functools.partial(linear_alone, linear)

"""The linear by CUDA kernels; the rows of the loss, or a product, read its output again."""

import functools

from modxfer_fast.kernels.lora_linear import cuda_impl as linear
from modxfer_fast.kernels.lora_projection_loss.linear import linear_alone

available = linear.available
supports = linear.supports
lora_projection_loss_linear = functools.partial(linear_alone, linear)

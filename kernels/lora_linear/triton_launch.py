"""What a launch is told of its targets, operands and GPU."""

from collections.abc import Sequence

import torch
from torch import Tensor
from triton.runtime.driver import driver

from modxfer_fast.kernels import env
from modxfer_fast.kernels.lora_linear.config import Gpu, ProductConfig, SkinnyConfig, product_config
from modxfer_fast.kernels.lora_linear.target import LoraTarget


def ranks_of(targets: Sequence[LoraTarget]) -> tuple[int, ...]:
    return tuple(target.lora_a.shape[0] for target in targets)


def weight_strides(targets: Sequence[LoraTarget], dim: int) -> tuple[int, ...]:
    return tuple(0 if t.weight is None else t.weight.stride(dim) for t in targets)


def widest(x: Tensor, targets: Sequence[LoraTarget]) -> int:
    """Bytes of an element of x in the dtype that it is multiplied in."""
    return max(x.dtype.itemsize, *(target.lora_a.dtype.itemsize for target in targets))


def base_precision() -> str:
    """How fp32 is multiplied, as torch does; half precision does not ask."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def lora_precision(x: Tensor) -> str:
    """Beside half-precision x, fp32 adapters need no more than tf32: x is exact in it."""
    return base_precision() if x.dtype == torch.float32 else "tf32"


def config_of_product(
    operands: Sequence[Tensor],
    targets: Sequence[LoraTarget],
    like: Tensor,
    columns: int,
    **options: bool,
) -> ProductConfig:
    """Launch of operands times weights; `like` has the rows and the dtype of the result."""
    weights = [target.weight for target in targets if target.weight is not None]
    return product_config(
        like.shape[0],
        columns,
        max(ranks_of(targets)),
        like.dtype.itemsize,
        current_gpu(),
        is_exact=is_exact(like),
        is_scattered=not all(_is_read_in_vectors(tensor) for tensor in (*operands, *weights)),
        **options,
    )


def is_exact(x: Tensor) -> bool:
    return x.dtype == torch.float32 and base_precision() == "ieee"


def _is_read_in_vectors(tensor: Tensor) -> bool:
    strides = tensor.stride()
    return 1 in strides and all(stride == 1 or stride % 16 == 0 for stride in strides)


def current_gpu() -> Gpu:
    if env.triton_interpreted():
        return Gpu("cuda", 80)
    target = driver.active.get_current_target()
    return Gpu(target.backend, target.arch if target.backend == "cuda" else 0)


def launch_options(config: ProductConfig | SkinnyConfig) -> dict:
    # fusion is said here because the default differs between Triton releases
    options = {
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "enable_fp_fusion": True,
    }
    if current_gpu().backend == "cuda":
        # without a limit ptxas may spill a register or two to fit one more program
        options["maxnreg"] = 255
    return options

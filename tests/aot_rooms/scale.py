"""The kernel that scales a gradient by the upstream one."""

import dataclasses

import torch

from modxfer_fast.kernels.common.triton_scale import scale_

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclasses.dataclass(frozen=True)
class Case:
    """`dtype` of the gradient; past 2^31 elements their number is a wider argument."""

    function: str
    dtype: str
    elements: int

    @property
    def most_registers(self) -> int:
        """Sixteen programs of 128 threads fill a multiprocessor."""
        return 32

    def launch(self) -> None:
        values = torch.empty(self.elements, dtype=DTYPES[self.dtype], device="meta")
        scale_(values, torch.empty((), device="meta"))


def all_cases() -> list[Case]:
    """Every dtype, elements that sixteen divides or not, and more than fit an int32."""
    return [
        Case("scale", dtype, elements)
        for dtype in DTYPES
        for elements in (128256 * 4096, 50257, 2**31 + 16)
    ]


def core_cases() -> list[Case]:
    """A head, an odd number of elements, and more than fit an int32."""
    return [
        Case("scale", "bf16", 128256 * 4096),
        Case("scale", "fp32", 50257),
        Case("scale", "bf16", 2**31 + 16),
    ]

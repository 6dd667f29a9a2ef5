"""The kernels of `correlation` as a stream of tokens launches them."""

import dataclasses
import itertools

import torch

from modxfer_fast.kernels.correlation import triton_impl
from modxfer_fast.kernels.correlation.op import MAX_ROWS

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# MiniLM, BERT-base, BERT-large, Llama-3.1 8B, and a width no tile divides
WIDTHS = (384, 768, 1024, 4096, 1001)


@dataclasses.dataclass(frozen=True)
class Case:
    """One kernel and the inputs it is launched for; `dtype` is of the features."""

    function: str
    dtype: str
    width_x: int
    width_y: int
    has_mask: bool = False
    rows: int = MAX_ROWS

    @property
    def most_registers(self) -> int:
        """Four programs of 128 threads share a multiprocessor's 65536 registers."""
        return 128

    def launch(self) -> None:
        x = torch.empty(self.rows, self.width_x, dtype=DTYPES[self.dtype], device="meta")
        y = torch.empty(self.rows, self.width_y, device="meta")
        double = lambda *shape: torch.empty(*shape, dtype=torch.float64, device="meta")
        if self.function == "centre":
            mask = torch.empty(self.rows, dtype=torch.bool, device="meta")
            centred, sums = torch.empty_like(x, dtype=torch.float32), double(2, self.width_x)
            triton_impl.correlation_centre(
                x, mask if self.has_mask else None, double(self.width_x), centred, sums
            )
        elif self.function == "gram":
            triton_impl.correlation_gram(x, double(self.width_x, self.width_x))
        else:
            triton_impl.correlation_product(x, y, double(self.width_x, self.width_y))


def all_cases() -> list[Case]:
    """Every dtype, width and pair of widths, narrow ones too."""
    cases = [
        Case("centre", dtype, width, width, has_mask)
        for dtype, width, has_mask in itertools.product(DTYPES, WIDTHS, (True, False))
    ]
    for width_x, width_y in itertools.product((64, *WIDTHS), repeat=2):
        cases.append(Case("product", "fp32", width_x, width_y))
    return cases + [Case("gram", "fp32", width, width) for width in (64, *WIDTHS)]


def core_cases() -> list[Case]:
    """Both layouts of the rows, both tiles of the product, and the symmetric one."""
    return [
        Case("centre", "bf16", 768, 768, has_mask=True),
        Case("centre", "fp32", 1001, 1001),
        Case("product", "fp32", 768, 1024),
        Case("product", "fp32", 64, 128),
        Case("product", "fp32", 1001, 384),
        Case("gram", "fp32", 1024, 1024),
    ]

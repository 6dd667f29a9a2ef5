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

    dtype: str
    width: int
    has_mask: bool = False
    rows: int = MAX_ROWS
    function: str = "centre"

    @property
    def most_registers(self) -> int:
        """Four programs of 128 threads share a multiprocessor's 65536 registers."""
        return 128

    def launch(self) -> None:
        x = torch.empty(self.rows, self.width, dtype=DTYPES[self.dtype], device="meta")
        double = lambda *shape: torch.empty(*shape, dtype=torch.float64, device="meta")
        mask = torch.empty(self.rows, dtype=torch.bool, device="meta")
        centred, sums = torch.empty_like(x, dtype=torch.float32), double(2, self.width)
        triton_impl.correlation_centre(
            x, mask if self.has_mask else None, double(self.width), centred, sums
        )


def all_cases() -> list[Case]:
    """Every dtype and width."""
    return [Case(*parts) for parts in itertools.product(DTYPES, WIDTHS, (True, False))]


def core_cases() -> list[Case]:
    """Both layouts of the rows."""
    return [Case("bf16", 768, has_mask=True), Case("fp32", 1001)]

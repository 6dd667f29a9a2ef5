"""The row kernel of `projection_loss` as it is launched in training."""

import dataclasses
import itertools

import torch

from modxfer_fast.kernels.names import ROW_LOSSES
from modxfer_fast.kernels.projection_loss import NORMS, triton_impl
from modxfer_fast.kernels.projection_loss.spec import ProjectionSpec

# (z, t, dz); the first is the streamed loss, the others are states without a projection
DTYPES = {
    "fp32-bf16": (torch.float32, torch.bfloat16, torch.bfloat16),
    "fp32": (torch.float32, torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16, torch.float16),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One kernel: a loss after a norm, and the inputs it is launched for."""

    loss: str
    norm: str
    dtypes: str
    has_grad: bool = True
    width: int = 4096
    rows: int = 4096
    function: str = "projection_loss_rows"

    @property
    def most_registers(self) -> int:
        """Two programs of 512 threads share a multiprocessor's 65536 registers."""
        return 64

    def launch(self) -> None:
        z, t, dz = (
            torch.empty(self.rows, self.width, dtype=dtype, device="meta")
            for dtype in DTYPES[self.dtypes]
        )
        weights = torch.empty(self.rows, device="meta")
        spec = ProjectionSpec(self.loss, norm=self.norm)
        triton_impl.projection_loss_rows(z, t, weights, spec, dz if self.has_grad else None)


def all_cases() -> list[Case]:
    """The whole product at a width that one tile holds, then narrow, wide and unaligned rows."""
    cases = [Case(*parts) for parts in itertools.product(ROW_LOSSES, NORMS, DTYPES, (True, False))]
    for loss, norm in itertools.product(ROW_LOSSES, NORMS):
        case = Case(loss, norm, "fp32-bf16")
        cases += [dataclasses.replace(case, width=width) for width in (384, 1001, 16384)]
    return cases


def core_cases() -> list[Case]:
    """Every loss with the norm that needs most registers, as streamed; two more layouts."""
    cases = [Case(loss, "layer", "fp32-bf16") for loss in ROW_LOSSES]
    return [*cases, Case("mse", "none", "fp32-bf16"), Case("cosine", "none", "bf16")]

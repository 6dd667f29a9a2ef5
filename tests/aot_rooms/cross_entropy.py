"""The row kernels of `linear_cross_entropy` as they are launched in training."""

import dataclasses
import itertools

import torch

from modxfer_fast.kernels.common import KDSpec
from modxfer_fast.kernels.kd_loss import triton_cross_entropy

# (logits, dlogits); the first is the streamed loss of a half-precision head
DTYPES = {
    "fp32-bf16": (torch.float32, torch.bfloat16),
    "fp32": (torch.float32, torch.float32),
}
# (label_smoothing, z_loss_weight, columns of extras, soft cap)
OBJECTIVES = {
    "ce": (0.0, 0.0, 0, None),
    "ce+z": (0.0, 1e-4, 1, None),
    "all": (0.1, 1e-4, 4, None),
    "capped": (0.1, 1e-4, 4, 30.0),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One kernel: a function of `kd_loss.triton_cross_entropy` and the inputs of its launch."""

    function: str
    objective: str
    dtypes: str
    rows: int = 4096
    vocab_size: int = 128256

    @property
    def most_registers(self) -> int:
        """Two programs of 512 threads share a multiprocessor's 65536 registers."""
        return 64

    def launch(self) -> None:
        logits_dtype, dlogits_dtype = DTYPES[self.dtypes]
        smoothing, z_loss_weight, num_extras, softcap = OBJECTIVES[self.objective]
        spec = KDSpec(
            kd_weight=0.0,
            ce_weight=1.0,
            label_smoothing=smoothing,
            z_loss_weight=z_loss_weight,
            student_softcap=softcap,
        )

        def empty(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.empty(size, dtype=dtype, device="meta")

        logits = empty(self.rows, self.vocab_size, dtype=logits_dtype)
        labels = empty(self.rows, dtype=torch.int64)
        extras = empty(self.rows, num_extras) if num_extras else None
        if self.function == "cross_entropy_fwd":
            triton_cross_entropy.cross_entropy_fwd(logits, None, labels, spec, extras)
        else:
            dlogits = empty(self.rows, self.vocab_size, dtype=dlogits_dtype)
            triton_cross_entropy.cross_entropy_fwd_bwd(
                logits, None, labels, empty(self.rows), spec, dlogits, extras
            )


FUNCTIONS = ("cross_entropy_fwd", "cross_entropy_fwd_bwd")


def all_cases() -> list[Case]:
    """The product at the large vocabulary, then every other launch of `row_config`."""
    cases = [Case(*parts) for parts in itertools.product(FUNCTIONS, OBJECTIVES, DTYPES)]
    for function in FUNCTIONS:
        case = Case(function, "all", "fp32-bf16")
        cases.append(dataclasses.replace(case, rows=8))
        cases.append(dataclasses.replace(case, vocab_size=8192))
        cases.append(dataclasses.replace(case, vocab_size=1000))
    return cases


def core_cases() -> list[Case]:
    """As most often launched, and with all that may be asked for."""
    return [Case(*parts, "fp32-bf16") for parts in itertools.product(FUNCTIONS, ("ce", "all"))]

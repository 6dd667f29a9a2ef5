"""The row kernels of `kd_loss` in stages, for classes that several ranks share."""

import dataclasses
import itertools

import torch
from aot_rooms.kd_loss import option_of

from modxfer_fast.kernels.common import KDSpec
from modxfer_fast.kernels.divergences import DIVERGENCES
from modxfer_fast.kernels.kd_loss import triton_stages

FUNCTIONS = ("kd_loss_stats", "kd_loss_sums", "kd_loss_write")
# by what is asked for: (ce_weight, temperature, label smoothing, z-loss weight, softcap)
OBJECTIVES = {"kd": (0.0, 1.0, 0.0, 0.0, None), "all": (0.5, 2.0, 0.1, 1e-4, 30.0)}


@dataclasses.dataclass(frozen=True)
class Case:
    """One kernel: a function of `kd_loss.triton_stages` and the inputs it is launched for."""

    function: str
    divergence: str
    objective: str
    rows: int = 4096
    vocab_size: int = 16032  # an eighth of 128256

    @property
    def most_registers(self) -> int:
        """As of the fused kernels: fp32 logits, programs of 512 threads."""
        return 64

    def launch(self) -> None:
        ce_weight, temperature, smoothing, z_loss_weight, cap = OBJECTIVES[self.objective]
        spec = KDSpec(
            option_of(self.divergence),
            temperature=temperature,
            ce_weight=ce_weight,
            label_smoothing=smoothing,
            z_loss_weight=z_loss_weight,
            student_softcap=cap,
        )
        logits = torch.empty(self.rows, self.vocab_size, device="meta")
        labels = torch.empty(self.rows, dtype=torch.int64, device="meta") if ce_weight else None
        weights = torch.empty(self.rows, device="meta")
        stats = torch.empty(self.rows, 6, device="meta")
        if self.function == "kd_loss_stats":
            triton_stages.kd_loss_stats(logits, logits, labels, spec, ce_weight != 0.0)
        elif self.function == "kd_loss_sums":
            triton_stages.kd_loss_sums(logits, logits, stats, spec)
        else:
            if spec.record.whole is not None:
                width = 6 + spec.record.whole.num_numbers
                stats = torch.empty(self.rows, width, device="meta")
            dlogits = torch.empty_like(logits, dtype=torch.bfloat16)
            triton_stages.kd_loss_write(
                logits, logits, labels, 8 * self.vocab_size, weights, stats, spec, dlogits
            )


def all_cases() -> list[Case]:
    """The product, then every other launch of `row_config`."""
    cases = [Case(*parts) for parts in itertools.product(FUNCTIONS, DIVERGENCES, OBJECTIVES)]
    for function in FUNCTIONS:
        case = Case(function, "jsd", "all")
        cases.append(dataclasses.replace(case, rows=8))
        cases.append(dataclasses.replace(case, vocab_size=1000))
    return cases


def core_cases() -> list[Case]:
    """As most often launched, and with all that may be asked for."""
    return [
        Case("kd_loss_stats", "forward_kl", "kd"),
        Case("kd_loss_stats", "reverse_kl", "all"),
        Case("kd_loss_sums", "jsd", "kd"),
        Case("kd_loss_sums", "jsd", "all"),
        Case("kd_loss_sums", "forward_kl+jsd", "all"),
        Case("kd_loss_sums", "negative_log_acceptance", "all"),
        Case("kd_loss_sums", "logits_cosine", "all"),
        Case("kd_loss_write", "forward_kl", "kd"),
        Case("kd_loss_write", "jsd", "all"),
        Case("kd_loss_write", "forward_kl+jsd", "all"),
        Case("kd_loss_write", "renyi", "all"),
        Case("kd_loss_write", "logits_cosine", "all"),
    ]

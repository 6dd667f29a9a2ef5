"""The row kernel of `kd_loss` against a teacher that lists K classes, as launched in training."""

import dataclasses
import itertools

import torch
from aot_rooms.kd_loss import ALL, DTYPES, OBJECTIVES, OF_PROBABILITIES, option_of

from modxfer_fast.kernels.common import KDSpec
from modxfer_fast.kernels.divergences import DIVERGENCES
from modxfer_fast.kernels.kd_loss import triton_topk
from modxfer_fast.kernels.kd_loss.topk import TopKRows
from modxfer_fast.kernels.names import TAILS

FUNCTIONS = ("topk_kd_loss_fwd", "topk_kd_loss_fwd_bwd")


@dataclasses.dataclass(frozen=True)
class Case:
    """One kernel: a function of `kd_loss.triton_topk` and the inputs it is launched for."""

    function: str
    divergence: str
    tail: str
    objective: str
    dtypes: str
    rows: int = 4096
    vocab_size: int = 128256
    k: int = 64

    @property
    def most_registers(self) -> int:
        """As of `kd_loss`: two programs of 512 threads share a multiprocessor's registers."""
        return 64 if self.dtypes.startswith("fp32") else 128

    def launch(self) -> None:
        logits_dtype, dlogits_dtype = DTYPES[self.dtypes]
        has_all = self.objective == ALL
        ce_weight, temperature = OBJECTIVES["kd+ce-t2" if has_all else self.objective]
        divergence = option_of(self.divergence)
        spec = KDSpec(divergence, temperature=temperature, ce_weight=ce_weight).checked()
        if has_all:
            spec = dataclasses.replace(spec, label_smoothing=0.1, z_loss_weight=1e-4)
        lse = torch.empty(self.rows, 1, device="meta") if has_all else None
        student = torch.empty(self.rows, self.vocab_size, dtype=logits_dtype, device="meta")
        ids = torch.empty(self.rows, self.k, dtype=torch.int64, device="meta")
        log_probs, weights = torch.empty(ids.shape, device="meta"), ids.new_empty(self.rows).float()
        log_tail = weights if self.tail == "bucket" else None
        teacher = TopKRows(ids, log_probs, log_tail, self.tail)
        labels = ids.new_empty(self.rows) if ce_weight else None
        if self.function == "topk_kd_loss_fwd":
            triton_topk.topk_kd_loss_fwd(student, teacher, labels, spec, lse)
        else:
            dlogits = torch.empty_like(student, dtype=dlogits_dtype)
            triton_topk.topk_kd_loss_fwd_bwd(student, teacher, labels, weights, spec, dlogits, lse)


def all_cases() -> list[Case]:
    products = itertools.product(FUNCTIONS, OF_PROBABILITIES, TAILS, OBJECTIVES, DTYPES)
    return [Case(*parts) for parts in products if _is_launched(*parts[1:3])]


def _is_launched(divergence: str, tail: str) -> bool:
    """The others are refused, or have another tail where they reach the kernel."""
    if tail == "renormalise":
        return not DIVERGENCES[divergence].joins
    return tail == "bucket" or DIVERGENCES[divergence].whole is None


def core_cases() -> list[Case]:
    """As most often launched, and where most registers are needed."""
    cases = [
        Case("topk_kd_loss_fwd_bwd", divergence, tail, *rest)
        for divergence, tail in (("forward_kl", "bucket"), ("alpha_beta", "renormalise"))
        for rest in (("kd", "fp32-bf16"), ("kd+ce-t2", "bf16"))
    ]
    cases.append(Case("topk_kd_loss_fwd_bwd", "forward_kl+jsd", "bucket", ALL, "fp32-bf16"))
    cases.append(Case("topk_kd_loss_fwd_bwd", "renyi", "bucket", "kd+ce-t2", "fp32-bf16"))
    return [*cases, Case("topk_kd_loss_fwd", "forward_kl", "bucket", "kd", "fp32-bf16")]

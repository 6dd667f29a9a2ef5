"""The row kernels of `kd_loss` as they are launched in training."""

import dataclasses
import itertools

import torch

from modxfer_fast.kernels.common import KDSpec
from modxfer_fast.kernels.divergences import DIVERGENCES, DivergenceOption
from modxfer_fast.kernels.kd_loss import triton_impl

FUNCTIONS = ("kd_loss_fwd", "kd_loss_bwd", "kd_loss_fwd_bwd")
# (student and teacher, dlogits); the first is the streamed loss, the others are logits of a model
DTYPES = {
    "fp32-bf16": (torch.float32, torch.bfloat16),
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16),
}
# (ce_weight, temperature): without labels, sharing the softmax with the divergence, with its own
OBJECTIVES = {"kd": (0.0, 1.0), "kd+ce": (0.5, 1.0), "kd+ce-t2": (0.5, 2.0)}
# of "bent", which is "kd+ce" of models that cap or scale their logits
BENT = {"student_softcap": 30.0, "teacher_logit_scale": 0.0625}
# beside the last: label smoothing, z-loss and by-products
ALL = "all-t2"
# of "kd+ce-t2", where each row has a temperature of its own
TOKENS = "kd+ce-tokens"
# of "kd+ce", where both heads have a bias
BIASED = "biased"


OF_PROBABILITIES = [r.name for r in DIVERGENCES.values() if r.row_sums != "of_logits"]


def option_of(divergence: str) -> DivergenceOption:
    """Of "a+b" the weights."""
    names = divergence.split("+")
    return dict.fromkeys(names, 1.0) if len(names) > 1 else divergence


@dataclasses.dataclass(frozen=True)
class Case:
    """One kernel: a function of `kd_loss.triton_impl` and the inputs it is launched for."""

    function: str
    divergence: str  # of a weighted sum "a+b", all of weight 1
    objective: str
    dtypes: str
    rows: int = 4096
    vocab_size: int = 128256

    @property
    def most_registers(self) -> int:
        """Two programs of 512 threads share a multiprocessor's 65536 registers (fp32 logits); with
        16-bit logits a program has half the threads."""
        return 64 if self.dtypes.startswith("fp32") else 128

    def launch(self) -> None:
        logits_dtype, dlogits_dtype = DTYPES[self.dtypes]
        is_bent, has_all = self.objective == "bent", self.objective == ALL
        has_own, named = self.objective == TOKENS, self.objective
        if named not in OBJECTIVES:
            named = "kd+ce" if named in ("bent", BIASED) else "kd+ce-t2"
        ce_weight, temperature = OBJECTIVES[named]
        bends = BENT if is_bent else {}
        divergence = option_of(self.divergence)
        spec = KDSpec(divergence, None, temperature, 1.0, ce_weight, **bends).checked()
        if has_all:
            spec = dataclasses.replace(spec, label_smoothing=0.1, z_loss_weight=1e-4)
        if has_own:
            spec = spec.of_rows(torch.empty(self.rows, 2, device="meta"))
        if self.objective == BIASED:
            bias = torch.empty(self.vocab_size, dtype=torch.bfloat16, device="meta")
            spec = spec.of_heads(bias, bias)
        extras = torch.empty(self.rows, 6, device="meta") if has_all else None
        shape = (self.rows, self.vocab_size)
        student = torch.empty(shape, dtype=logits_dtype, device="meta")
        teacher = torch.empty_like(student)
        labels = (
            torch.empty(self.rows, dtype=torch.int64, device="meta") if spec.ce_weight else None
        )
        weights = torch.empty(self.rows, device="meta")
        stats = torch.empty(self.rows, 6, device="meta")
        dlogits = torch.empty(shape, dtype=dlogits_dtype, device="meta")
        if self.function == "kd_loss_fwd":
            triton_impl.kd_loss_fwd(student, teacher, labels, spec, extras)
        elif self.function == "kd_loss_bwd":
            triton_impl.kd_loss_bwd(student, teacher, labels, weights, stats, spec, dlogits)
        else:
            triton_impl.kd_loss_fwd_bwd(student, teacher, labels, weights, spec, dlogits, extras)


def all_cases() -> list[Case]:
    """The whole product at the large vocabulary, then every other launch of `row_config`.

    V and the number of rows are run-time arguments: 32000 and 128256 columns share a kernel.
    """
    cases = [
        Case(*parts) for parts in itertools.product(FUNCTIONS, DIVERGENCES, OBJECTIVES, DTYPES)
    ]
    for function, divergence in itertools.product(FUNCTIONS, DIVERGENCES):
        case = Case(function, divergence, "kd+ce-t2", "fp32-bf16")
        cases.append(dataclasses.replace(case, rows=8))
        cases.append(dataclasses.replace(case, vocab_size=8192))
        cases.append(dataclasses.replace(case, vocab_size=1000))
    return cases


def core_cases() -> list[Case]:
    """Every kernel and divergence as most often launched, and where it needs most registers.

    Of divergences that share their passes with others, what streams and trains.
    """
    everywhere = [
        Case(function, divergence, objective, dtypes)
        for function, divergence in itertools.product(
            FUNCTIONS, ("forward_kl", "reverse_kl", "jsd")
        )
        for objective, dtypes in (("kd", "fp32-bf16"), ("kd+ce-t2", "bf16"))
    ] + [
        *(Case(function, "jsd", "bent", "fp32-bf16") for function in FUNCTIONS[::2]),
        Case("kd_loss_fwd_bwd", "jsd", ALL, "fp32-bf16"),
        *(Case(function, "jsd", TOKENS, "fp32-bf16") for function in FUNCTIONS),
        *(Case(FUNCTIONS[2], divergence, BIASED, "fp32-bf16") for divergence in ("jsd", "renyi")),
    ]
    held = {case.divergence for case in everywhere}
    others = [
        Case("kd_loss_fwd_bwd", divergence, "kd+ce-t2", "fp32-bf16")
        for divergence in (*DIVERGENCES, "forward_kl+jsd")
        if divergence not in held
    ]
    return everywhere + others

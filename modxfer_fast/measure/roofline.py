"""The roof of this machine, measured, and the time it allows a formula.

A large copy gives bytes per second, a large matrix product in the case's dtype gives FLOPs per
second; the best of their rounds counts, since a roof is what the machine can do. What a formula
cannot do without is counted in its bench module, a comment naming each read and write.
"""

from dataclasses import dataclass

import torch

from modxfer_fast.measure.timing import QUICK, Step, clock_of, warm_up

_COPY_BYTES = {"cpu": 2**28, "cuda": 2**31}
_MATMUL_WIDTH = {"cpu": 1024, "cuda": 8192}
_ROUNDS = 10
_BUDGET_S = 3.0


@dataclass(frozen=True)
class Work:
    """What a formula cannot do without.

    Attributes:
        flops: two for each multiplication of its matrix products; rows of losses are not counted.
        bytes: each input read and each result written once by each pass that needs it.
    """

    flops: int
    bytes: int


@dataclass(frozen=True)
class Roof:
    bytes_per_s: float
    flops_per_s: float

    def predicted_ms(self, *steps: Work) -> float:
        """Of steps one after another, each as long as the limit that it meets last."""
        return 1e3 * sum(
            max(work.bytes / self.bytes_per_s, work.flops / self.flops_per_s) for work in steps
        )

    def described(self) -> dict[str, str]:
        return {
            "copy": f"{self.bytes_per_s / 1e9:.1f} GB/s",
            "matmul": f"{self.flops_per_s / 1e12:.3g} TFLOP/s",
        }


def measure_roof(
    device: str,
    dtype: torch.dtype,
    copy_bytes: int | None = None,
    matmul_width: int | None = None,
) -> Roof:
    """Bytes read plus bytes written per second of a copy, FLOPs per second of `torch.mm`.

    Args:
        copy_bytes, matmul_width: None for sizes past every cache of such a device.
    """
    size, width = copy_bytes or _COPY_BYTES[device], matmul_width or _MATMUL_WIDTH[device]
    source = torch.ones(size, dtype=torch.int8, device=device)
    copied = torch.empty_like(source)
    copy_s = _best_s(lambda: copied.copy_(source), device)
    a, b = (torch.randn(width, width, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    matmul_s = _best_s(lambda: torch.mm(a, b, out=out), device)
    return Roof(2 * size / copy_s, 2 * width**3 / matmul_s)


def _best_s(step: Step, device: str) -> float:
    clock = clock_of(device)
    warm_up(step, device, QUICK.warmup_s)
    best, spent = float("inf"), 0.0
    for _ in range(_ROUNDS):
        elapsed = clock.ms(step) / 1e3
        best, spent = min(best, elapsed), spent + elapsed
        if spent > _BUDGET_S:
            break
    return best

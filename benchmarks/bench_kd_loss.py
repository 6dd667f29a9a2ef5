"""kd_loss from logits, forward and backward, against plain PyTorch and a copy of as many bytes.

Bytes of formula and floor, b per logit: the forward reads both logits (2 b), the backward reads
both and writes dlogits (3 b).
"""

import torch
from torch import Tensor

from benchmarks.candidates import dense_divergence, divergence_columns, our_backends, training_step
from benchmarks.dense import dense_kd_loss
from benchmarks.harness import Candidate, Floor, Lineup
from benchmarks.inputs import logits_inputs, logits_truth
from benchmarks.rooms import Case, Room
from benchmarks.shapes import DEFAULT, SHAPES
from modxfer_fast import kd_loss
from modxfer_fast.kernels.common import KDSpec
from modxfer_fast.kernels.divergences import DIVERGENCES
from modxfer_fast.measure.roofline import Work

ROOM = Room(SHAPES, DEFAULT, axis="divergence", variants=tuple(DIVERGENCES), options={"beta": 0.5})
COPY = "copy of 5 N V"
_OUTPUTS = ("loss", "dlogits")


def lineup(case: Case) -> Lineup:
    student, teacher = logits_inputs(case.shape, case.dtype, case.device)
    divergence = divergence_columns(case)
    spec = KDSpec(case.variant, divergence.get("beta")).checked()
    compiled = torch.compile(dense_kd_loss, dynamic=False)

    def candidate(name: str, function, **options) -> Candidate:
        leaf = student.detach().requires_grad_()
        step = training_step(lambda: function(leaf, teacher, **options), {"dlogits": leaf})
        return Candidate(name, step, _OUTPUTS, COPY)

    candidates = [
        candidate(f"ours {backend}", kd_loss, **divergence, backend=backend)
        for backend in our_backends("kd_loss", case.device, case.dtype)
    ]
    dense = {"eager": dense_kd_loss, "torch.compile": compiled}
    candidates += [candidate(name, dense[name], **dense_divergence(case)) for name in dense]
    truth = lambda: logits_truth(student, teacher, spec)
    problem = {"N": case.shape.N, "V": case.shape.V, **divergence}
    return Lineup(problem, candidates, floors(student, teacher), truth)


def floors(student: Tensor, teacher: Tensor) -> dict[str, Floor]:
    """Copies that move the same bytes: a copy reads and writes, so two and a half of them."""
    out = torch.empty_like(student)
    half = student.shape[0] // 2

    def copies() -> None:
        out.copy_(student)
        out.copy_(teacher)
        out[:half].copy_(student[:half])

    return {COPY: Floor(copies, Work(flops=0, bytes=5 * student.numel() * student.element_size()))}

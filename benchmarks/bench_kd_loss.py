"""kd_loss from logits, forward and backward, against plain PyTorch and a copy of as many bytes.

Bytes of formula and floor, b per logit: the forward reads both logits (2 b), the backward reads
both and writes dlogits (3 b).
"""

import functools

import torch

from benchmarks import kd
from benchmarks.rooms import Candidate, Case, Floor, Lineup, ours, plain, training_step
from modxfer_fast import kd_loss
from modxfer_fast.measure.roofline import Work

ROOM = kd.ROOM
COPY = "copy of 5 N V"


def lineup(case: Case) -> Lineup:
    student, teacher = kd.logits_inputs(case.shape, case.dtype, case.device)
    spec, columns = kd.spec_of(case), kd.columns(case)
    losses = ours("kd_loss", case, kd_loss, **columns) | plain(kd.dense_kd_loss, spec=spec)
    candidates = []
    for name, loss in losses.items():
        leaf = student.detach().requires_grad_()
        step = training_step(functools.partial(loss, leaf, teacher), {"dlogits": leaf})
        candidates.append(Candidate(name, step, COPY))
    out, half = torch.empty_like(student), len(student) // 2

    def copies() -> None:
        """A copy reads and writes, so two and a half of them move the same bytes."""
        out.copy_(student)
        out.copy_(teacher)
        out[:half].copy_(student[:half])

    floor = Floor(copies, Work(flops=0, bytes=5 * student.numel() * student.element_size()))
    problem = {"N": case.shape.N, "V": case.shape.V, **columns}
    truth = functools.partial(kd.logits_truth, student, teacher, spec)
    return Lineup(problem, candidates, {COPY: floor}, truth)

"""linear_kd_loss, forward and backward, against peers and the bare GEMMs.

FLOPs of formula and floor: 2 N V (3 D_s + D_t) trainable, 2 N V (2 D_s + D_t) with a frozen
student's head. Bytes of the formula, b per element: both hidden states and both heads are read,
dhidden and dweight written; the floor also writes z_s and z_t and reads dz once or twice.
"""

import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks import kd, peers, roofline, rooms
from benchmarks.rooms import BUDGET, COARSE_BUDGET, Candidate, Case, Floor, Lineup
from modxfer_fast import linear_kd_loss
from modxfer_fast.measure.roofline import Work

ROOM = kd.ROOM
TRAINABLE, FROZEN = "gemms x4", "gemms x3, frozen head"


def lineup(case: Case) -> Lineup:
    delta = case.options.get("delta", kd.DELTA)
    inputs = kd.linear_inputs(case.shape, case.dtype, case.device, delta)
    spec, columns = kd.spec_of(case), kd.columns(case)
    candidate = functools.partial(_candidate, case, inputs)
    candidates = []
    losses = rooms.ours("linear_kd_loss", case, linear_kd_loss, **columns)
    if case.device == "cuda" and "ours triton" in losses:
        losses["ours triton, overlapped"] = overlapped(losses["ours triton"])
    for name, loss in losses.items():
        for frozen in (False, True):
            # the model of the loop runs kernels one after another
            has_steps = name.endswith(("cpp", "triton", "cuda"))
            steps = _steps(case, frozen) if has_steps else []
            of = f"{name}, frozen head" if frozen else name
            candidates.append(candidate(of, loss, frozen=frozen, steps=steps))
    for name, loss in rooms.plain(kd.dense_linear_kd_loss, spec=spec).items():
        candidates.append(candidate(name, loss, budget=COARSE_BUDGET))
    for package, (name, place, loss_of, budget) in _PEERS.items():
        found, why_not = peers.find_divergence(case.variant, package, *place)
        name, loss = peers.label(package, name), found and loss_of(found, case)
        candidates.append(candidate(name, loss, budget=budget, why_not=why_not))
    problem = dataclasses.asdict(case.shape) | columns
    truth = functools.partial(kd.linear_truth, inputs, spec)
    return Lineup(problem, candidates, _floors(inputs), truth)


def overlapped(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """With row kernels on a second stream of a GPU."""

    def on_two_streams(*tensors: Tensor) -> Tensor:
        with mock.patch.dict(os.environ, MODXFER_OVERLAP="1"):
            return loss(*tensors)

    return on_two_streams


def _work(case: Case, frozen: bool) -> Work:
    """Of the formula: no logits anywhere."""
    shape = case.shape
    student, teacher = (1 if frozen else 2) * shape.V + 2 * shape.N, shape.V + shape.N
    return Work(
        flops=2 * shape.N * shape.V * ((2 if frozen else 3) * shape.D_s + shape.D_t),
        bytes=case.dtype.itemsize * (student * shape.D_s + teacher * shape.D_t),
    )


def _steps(case: Case, frozen: bool) -> list[Work]:
    """Of the loop with compiled kernels, in the chunks that it plans."""
    problem = case.shape, case.dtype, case.device
    plan = roofline.plan(*problem, frozen=frozen)
    steps = roofline.steps(*problem, case.variant, plan, frozen=frozen)
    return [step.work for step in steps]


def _floors(inputs: kd.LinearInputs) -> dict[str, Floor]:
    """Of both the last product, the gradient of the head, is left out where that is frozen."""
    h_s, w_s, h_t, w_t = inputs
    dz = torch.randn(len(h_s), len(w_s), dtype=h_s.dtype, device=h_s.device)
    factors = (h_s, w_s.t()), (h_t, w_t.t()), (dz, w_s), (dz.t(), h_s)
    products = rooms.with_outputs(factors)
    return {TRAINABLE: rooms.gemms(products), FROZEN: rooms.gemms(products[:-1])}


def _liger(jsd_class: Any, case: Case) -> Callable[..., Tensor]:
    """Compiles its chunk function, runs on any device. No hard loss; all else is its default."""
    beta = peers.beta_of(**kd.columns(case))
    jsd = jsd_class(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta)
    labels = torch.zeros(case.shape.N, dtype=torch.int64, device=case.device)
    return lambda *tensors: jsd(*tensors, labels)


def _trl(function: Any, case: Case) -> Callable[..., Tensor]:
    """Triton rows on a GPU, its own torch tiles on a CPU."""
    beta = peers.beta_of(**kd.columns(case))
    return lambda h_s, w_s, h_t, w_t: function.apply(h_s, w_s, None, h_t, w_t, None, beta)[0].mean()


_LIGER = ("liger_kernel.chunked_loss", "LigerFusedLinearJSDLoss")
_TRL = ("trl.kernels.chunked_divergence", "ChunkedDivergenceFunction")
_PEERS = {
    "liger-kernel": ("liger chunked", _LIGER, _liger, COARSE_BUDGET),
    "trl": ("trl chunked", _TRL, _trl, BUDGET),
}


def _candidate(
    case: Case,
    inputs: kd.LinearInputs,
    name: str,
    loss: Callable[..., Tensor] | None,
    frozen: bool = False,
    **options,
) -> Candidate:
    """`loss` of hidden states and heads, None where it cannot run, as a training step."""
    hidden = inputs.student_hidden.detach().requires_grad_()
    weight = inputs.student_weight.detach().requires_grad_(not frozen)
    tensors = (hidden, weight, inputs.teacher_hidden, inputs.teacher_weight)
    leaves = {"dhidden": hidden, "dweight": weight}
    return Candidate(
        name,
        loss and rooms.training_step(functools.partial(loss, *tensors), leaves),
        FROZEN if frozen else TRAINABLE,
        _work(case, frozen),
        weights=(inputs.student_weight, inputs.teacher_weight),
        outputs=("loss", "dhidden") if frozen else None,
        **options,
    )

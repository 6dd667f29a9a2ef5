"""linear_cross_entropy, forward and backward, against peers and the bare GEMMs.

FLOPs of formula and floor: 6 N V D trainable, 4 N V D with a frozen head. Bytes of the formula, b
per element: hidden states and head are read, dhidden and dweight written; the floor also writes the
logits and reads their gradient once or twice.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import kd, peers, rooms
from benchmarks.rooms import BUDGET, COARSE_BUDGET, Candidate, Case, Floor, Lineup
from modxfer_fast import linear_cross_entropy
from modxfer_fast.measure.roofline import Work

TRAINABLE, FROZEN = "gemms x3", "gemms x2, frozen head"
SMOOTHING = {"plain": 0.0, "smoothed": 0.1}


@dataclass(frozen=True)
class Shape(rooms.Sizes):
    """N rows (tokens), D hidden width, V classes."""

    N: int
    D: int
    V: int


ROOM = rooms.Room(
    shapes={
        "smoke": Shape(64, 32, 1000),
        "cpu-gate": Shape(1024, 512, 32000),
        "llama3-1b": Shape(8192, 2048, 128256),
        "llama3-8b": Shape(8192, 4096, 128256),
        "qwen3-0.6b": Shape(8192, 1024, 151936),
        "gemma2-2b": Shape(8192, 2304, 256000),
    },
    default_shape={"cpu": "cpu-gate", "cuda": "llama3-1b"},
    axis="labels",
    variants=tuple(SMOOTHING),
)


def lineup(case: Case) -> Lineup:
    hidden, weight, labels = inputs = _inputs(case)
    smoothing = SMOOTHING[case.variant]
    candidate = functools.partial(_candidate, case, inputs)
    candidates = []
    options = {"label_smoothing": smoothing}
    for name, loss in rooms.ours("linear_kd_loss", case, linear_cross_entropy, **options).items():
        candidates.append(candidate(name, loss))
        candidates.append(candidate(f"{name}, frozen head", loss, frozen=True))
    for name, loss in rooms.plain(dense_linear_cross_entropy, smoothing=smoothing).items():
        candidates.append(candidate(name, loss, budget=COARSE_BUDGET))
    for package, (name, place, loss_of) in _PEERS.items():
        found, why_not = peers.find(package, *place)
        if package == "liger-kernel" and found is not None and case.device == "cpu":
            found, why_not = None, "runs on a GPU alone"
        if package == "torch" and found is not None and smoothing:
            found, why_not = None, f"has no {case.variant} in chunks"
        loss = found and loss_of(found, smoothing)
        label = peers.label(package, name)
        candidates.append(candidate(label, loss, budget=COARSE_BUDGET, why_not=why_not))
    truth = functools.partial(_truth, hidden, weight, labels, smoothing)
    return Lineup(ROOM.problem(case), candidates, _floors(hidden, weight), truth)


def _inputs(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states [N, D] and a head [V, D] whose logits have std 3; labels [N]."""
    shape, randn = case.shape, rooms.Normal(case.device)
    hidden = randn(shape.N, shape.D)
    weight = randn(shape.V, shape.D).mul_(kd.LOGIT_STD / math.sqrt(shape.D))
    labels = torch.arange(shape.N, device=case.device) * 7919 % shape.V
    return hidden.to(case.dtype), weight.to(case.dtype), labels


def dense_linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, smoothing: float
) -> Tensor:
    """By whole logits: softmax in fp32, autograd."""
    logits = F.linear(hidden, weight).float()
    return F.cross_entropy(logits, labels, label_smoothing=smoothing)


def _truth(hidden: Tensor, weight: Tensor, labels: Tensor, smoothing: float) -> rooms.Results:
    """Mean loss, dhidden and dweight in fp64, some rows at a time."""
    head = weight.double().requires_grad_()
    mean, grads = torch.zeros((), dtype=torch.float64, device=hidden.device), []
    for rows, of_rows in zip(hidden.split(kd.TRUTH_ROWS), labels.split(kd.TRUTH_ROWS), strict=True):
        leaf = rows.double().requires_grad_()
        part = F.cross_entropy(
            F.linear(leaf, head), of_rows, reduction="sum", label_smoothing=smoothing
        ) / len(hidden)
        part.backward()
        mean += part.detach()
        grads.append(leaf.grad)
    return {"loss": mean, "dhidden": torch.cat(grads), "dweight": head.grad}


def _work(case: Case, frozen: bool) -> Work:
    """Of the formula: no logits anywhere."""
    shape = case.shape
    return Work(
        flops=(4 if frozen else 6) * shape.N * shape.V * shape.D,
        bytes=case.dtype.itemsize * shape.D * ((1 if frozen else 2) * shape.V + 2 * shape.N),
    )


def _floors(hidden: Tensor, weight: Tensor) -> dict[str, Floor]:
    """Of both the last product, the gradient of the head, is left out where that is frozen."""
    dz = torch.randn(len(hidden), len(weight), dtype=hidden.dtype, device=hidden.device)
    products = rooms.with_outputs(((hidden, weight.t()), (dz, weight), (dz.t(), hidden)))
    return {TRAINABLE: rooms.gemms(products), FROZEN: rooms.gemms(products[:-1])}


def _torch(function: Any, smoothing: float) -> Callable[..., Tensor]:
    """In chunks, as its defaults have them; without options it makes whole logits."""
    from torch.nn import LinearCrossEntropyOptions

    return functools.partial(function, options=LinearCrossEntropyOptions())


def _liger(function: Any, smoothing: float) -> Callable[..., Tensor]:
    def loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        out = function.apply(hidden, weight, labels, None, None, -100, 0.0, smoothing)
        return out[0] if isinstance(out, tuple) else out

    return loss


_PEERS = {
    "liger-kernel": (
        "liger",
        (
            "liger_kernel.ops.fused_linear_cross_entropy",
            "LigerFusedLinearCrossEntropyFunction",
        ),
        _liger,
    ),
    "torch": (
        "torch.linear_cross_entropy, chunked",
        ("torch.nn.functional", "linear_cross_entropy"),
        _torch,
    ),
}


def _candidate(
    case: Case,
    inputs: tuple[Tensor, Tensor, Tensor],
    name: str,
    loss: Callable[..., Tensor] | None,
    frozen: bool = False,
    budget: Any = BUDGET,
    why_not: str = "",
) -> Candidate:
    """`loss` of hidden states, head and labels, None where it cannot run, as a training step."""
    hidden = inputs[0].detach().requires_grad_()
    weight = inputs[1].detach().requires_grad_(not frozen)
    return Candidate(
        name,
        loss
        and rooms.training_step(
            functools.partial(loss, hidden, weight, inputs[2]),
            {"dhidden": hidden, "dweight": weight},
        ),
        FROZEN if frozen else TRAINABLE,
        _work(case, frozen),
        weights=(inputs[1],),
        outputs=("loss", "dhidden") if frozen else None,
        budget=budget,
        why_not=why_not,
    )

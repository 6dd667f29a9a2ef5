"""teacher_topk: what a cache keeps of a teacher, beside torch.topk and a pass over the logits.

Of logits that are there already, [N, V], or of hidden states and a head, [N, D] and [V, D], whose
product comes first. Bytes of the formula, b per element: what is given is read once, and 8 K + 4 a
row are written; the floor of given logits is their maximum, that of a head its product.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import kd, rooms
from benchmarks.rooms import COARSE_BUDGET, Candidate, Case, Floor, Lineup
from modxfer_fast import TeacherLogits, TeacherTopK, teacher_topk
from modxfer_fast.measure.roofline import Work

FLOORS = {"logits": "one pass", "head": "gemm"}


@dataclass(frozen=True)
class Shape(rooms.Sizes):
    """N rows (tokens), D hidden width, V classes, K classes listed."""

    N: int
    D: int
    V: int
    K: int


ROOM = rooms.Room(
    shapes={
        "smoke": Shape(64, 32, 1000, 8),
        "cpu-gate": Shape(1024, 512, 32000, 64),
        "cpu-wide": Shape(256, 512, 128256, 64),
        "llama3-8b": Shape(8192, 4096, 128256, 64),
        "llama3-8b-k512": Shape(8192, 4096, 128256, 512),
        "gemma2-9b": Shape(8192, 3584, 256000, 64),
    },
    default_shape={"cpu": "cpu-gate", "cuda": "llama3-8b"},
    axis="of",
    variants=tuple(FLOORS),
)


def lineup(case: Case) -> Lineup:
    given, k = _inputs(case), case.shape.K
    candidates = [
        _candidate(case, name, functools.partial(ours, given, k, find))
        for name, find in rooms.ours("kd_loss", case, teacher_topk).items()
    ]
    for name, find in rooms.plain(sorted_by_torch, k=k).items():
        candidates.append(_candidate(case, name, functools.partial(find, *given)))
    floors = {FLOORS[case.variant]: _floor(given)}
    return Lineup(ROOM.problem(case), candidates, floors, functools.partial(_truth, given, k))


def _inputs(case: Case) -> tuple[Tensor, ...]:
    """Logits [N, V] of std 3, or hidden states [N, D] and a head [V, D] that have such."""
    shape, randn = case.shape, rooms.Normal(case.device)
    if case.variant == "logits":
        return (randn(shape.N, shape.V).mul_(kd.LOGIT_STD).to(case.dtype),)
    weight = randn(shape.V, shape.D).mul_(kd.LOGIT_STD / math.sqrt(shape.D))
    return randn(shape.N, shape.D).to(case.dtype), weight.to(case.dtype)


def ours(
    given: tuple[Tensor, ...], k: int, find: Callable[..., TeacherTopK]
) -> tuple[Tensor, Tensor]:
    found = find(*given, k=k) if len(given) > 1 else find(TeacherLogits(*given), k=k)
    assert found.log_tail is not None
    return found.log_probs, found.log_tail


def sorted_by_torch(*given: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """What a pipeline writes: `torch.topk`, `logsumexp`, and 1 minus the mass that is listed."""
    logits = (F.linear(*given) if len(given) > 1 else given[0]).float()
    values, _ = logits.topk(k)
    log_probs = values - logits.logsumexp(-1, keepdim=True)
    return log_probs, torch.log1p(-log_probs.exp().sum(-1))


def _truth(given: tuple[Tensor, ...], k: int) -> rooms.Results:
    """In fp64, some rows at a time."""
    probs, tails = [], []
    for rows in given[0].split(kd.TRUTH_ROWS):
        wide = rows.double()
        log_p = (F.linear(wide, given[1].double()) if len(given) > 1 else wide).log_softmax(-1)
        ordered = log_p.sort(dim=-1, descending=True).values
        probs.append(ordered[:, :k])
        tails.append(ordered[:, k:].logsumexp(-1))
    return {"log_probs": torch.cat(probs), "log_tail": torch.cat(tails)}


def _floor(given: tuple[Tensor, ...]) -> Floor:
    if len(given) > 1:
        return rooms.gemms(rooms.with_outputs(((given[0], given[1].t()),)))
    (logits,) = given
    out = logits.new_empty(len(logits))
    return Floor(lambda: torch.amax(logits, -1, out=out), Work(0, logits.nbytes + out.nbytes))


def _candidate(case: Case, name: str, find: Callable[[], tuple[Tensor, Tensor]]) -> Candidate:
    shape = case.shape
    of_head = case.variant == "head"
    read = (shape.N + shape.V) * shape.D if of_head else shape.N * shape.V
    return Candidate(
        name,
        lambda: dict(zip(("log_probs", "log_tail"), find(), strict=True)),
        FLOORS[case.variant],
        Work(
            flops=2 * shape.N * shape.V * shape.D if of_head else 0,
            bytes=case.dtype.itemsize * read + shape.N * (8 * shape.K + 4),
        ),
        # logits of half-precision products are rounded where they are stored
        budget=rooms.BUDGET if name.startswith("ours") else COARSE_BUDGET,
    )

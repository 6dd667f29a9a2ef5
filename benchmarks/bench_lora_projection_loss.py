"""lora_projection_loss, forward and backward, against the two ops, plain PyTorch and the GEMMs.

M rows (tokens)   K -> N widths of the linear   D_t width of the teacher   R, R_p ranks of the
adapters and of the projection   b bytes an element

FLOPs of the floor: 4 M K N of the frozen linear (h, and dx without dweight), and 6 M N D_t of a
projection, 6 M R_p (N + D_t) of one of rank R_p. Of the formula: 6 M R (K + N) more.
Bytes of the floor: each product reads two matrices and writes the third. Of the formula: x is read
twice, dx written; the residual, the teacher's state and the upstream gradient are read, h and the
residual's gradient written, the loss's gradient of h written and read; W, A, B are read by both
passes; P is read; gradients of A, B, P are written, s written and read; the mask is one bit an
element, written and read.

The upstream gradients make those of h from the loss and from the next layer equally large, so that
the check sees both.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import lora, rooms
from benchmarks.lora import BUDGET, SCALING
from benchmarks.rooms import Candidate, Case, Floor, Lineup
from modxfer_fast.kernels.lora_linear import LoraTarget, lora_linear
from modxfer_fast.kernels.lora_projection_loss import lora_projection_loss
from modxfer_fast.kernels.lora_projection_loss.reference import lora_projection_loss_reference
from modxfer_fast.kernels.projection_loss import projection_loss
from modxfer_fast.kernels.projection_loss.spec import ProjectionSpec
from modxfer_fast.measure.roofline import Work

FLOOR = "gemms"
# peers round projected states as well
PEER_BUDGET = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# std of the teacher's state less the projected student's: roundings of h stay small beside it
DELTA = 1.0
_RANKS = {"full": None, "none": 0, "rank16": 16, "rank64": 64}


@dataclass(frozen=True)
class Shape(rooms.Sizes):
    """M rows (tokens), K -> N of the linear, D_t of the teacher (N without a projection)."""

    M: int
    K: int
    N: int
    D_t: int
    R: int = 16


ROOM = rooms.Room(
    shapes={
        "smoke": Shape(64, 48, 32, 40, 8),
        "cpu-gate": Shape(2048, 1024, 1024, 1024),
        # down_proj, whose output joins the stream that hidden states are taken from
        "llama3-1b-from-8b": Shape(8192, 8192, 2048, 4096),
        "llama3-8b-from-70b": Shape(8192, 14336, 4096, 8192),
        "qwen3-0.6b-from-8b": Shape(8192, 3072, 1024, 4096),
        "llama3-8b-o": Shape(8192, 4096, 4096, 4096),
    },
    default_shape={"cpu": "cpu-gate", "cuda": "llama3-1b-from-8b"},
    axis="projection",
    variants=tuple(_RANKS),
    options={"dropout": 0.1},
)

Tensors = Mapping[str, Tensor]
# (tensors, seed or None) -> hidden [M, N], loss
Forward = Callable[[Tensors, Tensor | None], Sequence[Tensor]]


@dataclass(frozen=True)
class Problem:
    """Tensors of one case. `trained`: x, lora_a, lora_b, residual and the factors of P."""

    trained: dict[str, Tensor]
    weight: Tensor  # [N, K]
    teacher: Tensor  # [M, D_t]
    upstream: tuple[Tensor, Tensor]  # of hidden and loss
    dropout: float

    def target(self, tensors: Tensors) -> LoraTarget:
        adapters = tensors["lora_a"], tensors["lora_b"]
        weight = self.weight.to(adapters[0].dtype)
        return LoraTarget(weight, *adapters, SCALING, dropout=self.dropout)

    def leaves(self, dtype: torch.dtype) -> dict[str, Tensor]:
        return {n: t.to(dtype, copy=True).requires_grad_() for n, t in self.trained.items()}


def _factors(tensors: Tensors) -> list[Tensor]:
    """Of P, that of the student's width first."""
    return [tensors[name] for name in ("p", "p_a", "p_b") if name in tensors]


def _projection(tensors: Tensors) -> Tensor | tuple[Tensor, ...] | None:
    factors = _factors(tensors)
    return tuple(reversed(factors)) if len(factors) > 1 else next(iter(factors), None)


def lineup(case: Case) -> Lineup:
    problem = _problem(case)
    masked = functools.partial(_truth, problem, problem.dropout)
    unmasked = functools.partial(_truth, problem, 0.0) if problem.dropout else masked
    candidate = functools.partial(_candidate, case, problem)
    candidates = []
    for backend in rooms.our_backends("lora_projection_loss", case):
        for name, function in (("ours", _fused), ("two ops", _in_turn)):
            forward = functools.partial(function, problem, backend)
            candidates.append(candidate(f"{name} {backend}", forward))
    for name, function in rooms.plain(functools.partial(_eager, problem)).items():
        candidates.append(candidate(name, function, PEER_BUDGET, unmasked))
    columns = ROOM.problem(case) | {"D_t": problem.teacher.shape[1]}
    return Lineup(columns, candidates, {FLOOR: _floor(problem)}, masked, graphs=True)


def _work(problem: Problem) -> Work:
    """Of the formula."""
    x, residual = problem.trained["x"], problem.trained["residual"]
    (rows, width), out, rank = x.shape, residual.shape[1], len(problem.trained["lora_a"])
    parameters = sum(factor.numel() for factor in _factors(problem.trained))
    adapters = rank * (width + out)
    elements = 3 * x.numel() + 6 * residual.numel() + problem.teacher.numel()
    elements += 2 * problem.weight.numel() + 3 * adapters + 2 * rows * rank + 2 * parameters
    bits = 2 * x.numel() if problem.dropout > 0.0 else 0
    return Work(
        flops=4 * rows * width * out + 6 * rows * (adapters + parameters),
        bytes=x.element_size() * elements + bits // 8,
    )


def _floor(problem: Problem) -> Floor:
    """The products of the frozen linear and of the projection."""
    x, weight = problem.trained["x"], problem.weight
    rows = torch.randn_like(problem.trained["residual"])
    factors = [(x, weight.t()), (rows, weight)]
    for factor in _factors(problem.trained):
        dout = rows.new_empty(len(rows), len(factor)).normal_()
        factors += [(rows, factor.t()), (dout, factor), (dout.t(), rows)]
        rows = dout  # in place of the output, which is as large
    return rooms.gemms(rooms.with_outputs(factors))


def _fused(problem: Problem, backend: str, tensors: Tensors, seed: Tensor | None):
    return lora_projection_loss(
        tensors["x"],
        problem.target(tensors),
        problem.teacher,
        _projection(tensors),
        residual=tensors["residual"],
        seed=seed,
        backend=backend,
    )


def _in_turn(problem: Problem, backend: str, tensors: Tensors, seed: Tensor | None):
    weight, lora_a, lora_b, scaling, _, dropout = problem.target(tensors)
    options = {"scaling": scaling, "dropout": dropout, "seed": seed, "backend": backend}
    hidden = lora_linear(tensors["x"], weight, lora_a, lora_b, **options) + tensors["residual"]
    loss = projection_loss(hidden, problem.teacher, _projection(tensors), backend=backend)
    return hidden, loss


def _eager(problem: Problem, tensors: Tensors, seed: Tensor | None):
    """What PEFT computes, and the mean squared error of the projection in fp32. No seed: no mask.

    Without one the dropout is left out, which is how the function is checked.
    """
    hidden, z = _states(problem, tensors, 0.0 if seed is None else problem.dropout)
    return hidden, F.mse_loss(z.float(), problem.teacher.float())


def _states(problem: Problem, tensors: Tensors, dropout: float) -> tuple[Tensor, Tensor]:
    """Hidden and projected states."""
    x = tensors["x"]
    kept = F.dropout(x, dropout) if dropout else x
    part = F.linear(F.linear(kept, tensors["lora_a"]), tensors["lora_b"]) * SCALING
    hidden = F.linear(x, problem.weight) + part + tensors["residual"]
    return hidden, functools.reduce(F.linear, _factors(tensors), hidden)


def _candidate(
    case: Case, problem: Problem, name: str, forward: Forward, budget=BUDGET, truth=None
) -> Candidate:
    tensors, seed = problem.leaves(case.dtype), lora.seed_on(case.device)
    # peers with a truth of their own are checked without the mask that a seed asks for
    return Candidate(
        name,
        _step(problem, tensors, forward, seed),
        FLOOR,
        _work(problem),
        weights=(problem.weight, *(t for n, t in tensors.items() if n not in ("x", "residual"))),
        budget=budget,
        check_step=_step(problem, tensors, forward, None) if truth else None,
        truth=truth,
    )


def _step(
    problem: Problem, tensors: Tensors, forward: Forward, seed: Tensor | None
) -> Callable[[], rooms.Results]:
    leaves = {f"d{name}": tensor for name, tensor in tensors.items()}
    outputs = ("hidden", "loss")
    return rooms.training_step(lambda: forward(tensors, seed), leaves, outputs, problem.upstream)


def _problem(case: Case) -> Problem:
    """Unit x, weights that keep the scale, a LoRA part as large as the base's, a near teacher."""
    shape, randn, rank = case.shape, rooms.Normal(case.device), _RANKS[case.variant]
    d_t = shape.N if rank == 0 else shape.D_t
    scaled = lambda *size, factor: randn(*size).mul_(factor).to(case.dtype)
    trained = {
        "x": scaled(shape.M, shape.K, factor=1.0),
        "lora_a": scaled(shape.R, shape.K, factor=shape.K**-0.5),
        "lora_b": scaled(shape.N, shape.R, factor=shape.R**-0.5 / SCALING),
        "residual": scaled(shape.M, shape.N, factor=1.0),
    }
    weight = scaled(shape.N, shape.K, factor=shape.K**-0.5)
    if rank is None:
        trained["p"] = scaled(d_t, shape.N, factor=shape.N**-0.5)
    elif rank:
        trained["p_b"] = scaled(d_t, rank, factor=rank**-0.5)
        trained["p_a"] = scaled(rank, shape.N, factor=shape.N**-0.5)
    dhidden = scaled(shape.M, shape.N, factor=DELTA)
    dloss = torch.tensor(0.5 * shape.M * d_t, device=case.device)
    noise = randn(shape.M, d_t).mul_(DELTA)
    problem = Problem(trained, weight, noise, (dhidden, dloss), lora.dropout_of(case))
    wide = {name: tensor.float() for name, tensor in trained.items()}
    _, z = _states(dataclasses.replace(problem, weight=weight.float()), wide, 0.0)
    return dataclasses.replace(problem, teacher=noise.add_(z).to(case.dtype))


def _truth(problem: Problem, dropout: float) -> rooms.Results:
    """In fp64, by autograd through the definitions."""
    tensors, teacher = problem.leaves(torch.float64), problem.teacher.double()
    wide = dataclasses.replace(problem, upstream=[grad.double() for grad in problem.upstream])
    (mask,) = lora.masks(problem.trained["x"], dropout)

    def forward(tensors: Tensors, _: Tensor | None) -> Sequence[Tensor]:
        hidden, rows = lora_projection_loss_reference(
            tensors["x"],
            problem.target(tensors),
            teacher,
            _projection(tensors),
            None,
            ProjectionSpec("mse", "none", 1.0),
            residual=tensors["residual"],
            kept=mask,
        )
        return hidden, rows.mean()

    return _step(wide, tensors, forward, None)()

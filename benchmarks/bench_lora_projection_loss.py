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
the check sees both. Peers draw their masks from torch's generator: they are checked without
dropout, and timed with it.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.candidates import forward_backward, our_backends
from benchmarks.harness import Candidate, Floor, Lineup
from benchmarks.inputs import Normal
from benchmarks.rooms import Case, Room
from benchmarks.shapes import Sizes
from modxfer_fast.kernels.lora_linear import LoraTarget, lora_linear
from modxfer_fast.kernels.lora_linear.dropout import dropout_bits, unpack
from modxfer_fast.kernels.lora_projection_loss import lora_projection_loss
from modxfer_fast.kernels.lora_projection_loss.reference import lora_projection_loss_reference
from modxfer_fast.kernels.projection_loss import projection_loss
from modxfer_fast.kernels.projection_loss.spec import ProjectionSpec
from modxfer_fast.measure.roofline import Work

FLOOR = "gemms"
# h, s and the sum of both gradients of h are rounded, one after another; a wrong scale of a part is
# off by a tenth and more
BUDGET = {torch.float32: 1e-4, torch.float16: 3e-3, torch.bfloat16: 1e-2}
# peers round projected states as well
PEER_BUDGET = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
SCALING = 2.0
# std of the teacher's state less the projected student's: roundings of h stay small beside it
DELTA = 1.0
_SEED = 1234
_RANKS = {"full": None, "none": 0, "rank16": 16, "rank64": 64}


@dataclass(frozen=True)
class Shape(Sizes):
    """M rows (tokens), K -> N of the linear, D_t of the teacher (N without a projection)."""

    M: int
    K: int
    N: int
    D_t: int
    R: int = 16


ROOM = Room(
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

# (tensors by name, seed or None) -> hidden [M, N], loss
Forward = Callable[[Mapping[str, Tensor], Tensor | None], Sequence[Tensor]]


@dataclass(frozen=True)
class Problem:
    """Tensors of one case. `trained`: x, lora_a, lora_b, residual and the factors of P."""

    trained: dict[str, Tensor]
    weight: Tensor  # [N, K]
    teacher: Tensor  # [M, D_t]
    upstream: tuple[Tensor, Tensor]  # of hidden and loss
    dropout: float

    @property
    def gradients(self) -> dict[str, str]:
        return {name: f"d{name}" for name in self.trained}

    def target(self, tensors: Mapping[str, Tensor]) -> LoraTarget:
        adapters = tensors["lora_a"], tensors["lora_b"]
        weight = self.weight.to(adapters[0].dtype)
        return LoraTarget(weight, *adapters, SCALING, dropout=self.dropout)

    def leaves(self, dtype: torch.dtype) -> dict[str, Tensor]:
        return {n: t.to(dtype, copy=True).requires_grad_() for n, t in self.trained.items()}


def projection_of(tensors: Mapping[str, Tensor]) -> Tensor | tuple[Tensor, Tensor] | None:
    if "p_b" in tensors:
        return tensors["p_b"], tensors["p_a"]
    return tensors.get("p")


def lineup(case: Case) -> Lineup:
    problem = _problem(case)
    masked = functools.partial(_truth, problem, _mask(problem))
    unmasked = masked if problem.dropout == 0.0 else functools.partial(_truth, problem, None)
    linear, loss = (
        our_backends(room, case.device, case.dtype) for room in ("lora_linear", "projection_loss")
    )
    candidates = []
    for backend in (name for name in linear if name in loss):
        fused = functools.partial(_fused, problem, backend)
        in_turn = functools.partial(_in_turn, problem, backend)
        candidates += [
            _candidate(case, problem, f"ours {backend}", fused),
            _candidate(case, problem, f"two ops {backend}", in_turn),
        ]
    eager = functools.partial(_eager, problem)
    compiled = torch.compile(eager, dynamic=False)
    for name, function in (("eager", eager), ("torch.compile", compiled)):
        options = {"budget": PEER_BUDGET, "truth": unmasked}
        candidates.append(_candidate(case, problem, name, function, **options))
    shape = dataclasses.asdict(case.shape) | {"D_t": problem.teacher.shape[1]}
    columns = shape | {"projection": case.variant, "dropout": problem.dropout}
    return Lineup(columns, candidates, floors(problem), masked, graphs=True)


def work(problem: Problem) -> Work:
    """Of the formula."""
    x, residual = problem.trained["x"], problem.trained["residual"]
    (rows, width), out, rank = x.shape, residual.shape[1], problem.trained["lora_a"].shape[0]
    factors = [problem.trained[name] for name in ("p", "p_b", "p_a") if name in problem.trained]
    parameters = sum(factor.numel() for factor in factors)
    adapters = rank * (width + out)
    elements = 3 * x.numel() + 6 * residual.numel() + problem.teacher.numel()
    elements += 2 * problem.weight.numel() + 3 * adapters + 2 * rows * rank + 2 * parameters
    bits = 2 * x.numel() if problem.dropout > 0.0 else 0
    return Work(
        flops=4 * rows * width * out + 6 * rows * (adapters + parameters),
        bytes=x.element_size() * elements + bits // 8,
    )


def floors(problem: Problem) -> dict[str, Floor]:
    """The products of the frozen linear and of the projection, into preallocated outputs."""
    x, weight = problem.trained["x"], problem.weight
    hidden, dx = torch.randn_like(problem.trained["residual"]), torch.empty_like(x)
    products = [(x, weight.t(), torch.empty_like(hidden)), (hidden, weight, dx)]
    rows = hidden
    dz, chain = torch.randn_like(problem.teacher), []
    for name in ("p", "p_a", "p_b"):
        if name not in problem.trained:
            continue
        factor = problem.trained[name]
        out = torch.randn_like(dz) if name != "p_a" else dz.new_ones(len(dz), len(factor))
        chain.append((rows, factor, out))
        rows = out
    for rows, factor, out in chain:
        dout = dz if out.shape == dz.shape else torch.ones_like(out)
        products.append((rows, factor.t(), out))
        products.append((dout, factor, torch.empty_like(rows)))
        products.append((dout.t(), rows, torch.empty_like(factor)))

    def step() -> None:
        for left, right, result in products:
            torch.mm(left, right, out=result)

    flops = sum(2 * left.numel() * right.shape[1] for left, right, _ in products)
    elements = sum(tensor.numel() for product in products for tensor in product)
    return {FLOOR: Floor(step, Work(flops, x.element_size() * elements))}


def _fused(problem: Problem, backend: str, tensors: Mapping[str, Tensor], seed: Tensor | None):
    return lora_projection_loss(
        tensors["x"],
        problem.target(tensors),
        problem.teacher,
        projection_of(tensors),
        residual=tensors["residual"],
        seed=seed,
        backend=backend,
    )


def _in_turn(problem: Problem, backend: str, tensors: Mapping[str, Tensor], seed: Tensor | None):
    weight, lora_a, lora_b, scaling, _, dropout = problem.target(tensors)
    options = {"scaling": scaling, "dropout": dropout, "seed": seed, "backend": backend}
    hidden = lora_linear(tensors["x"], weight, lora_a, lora_b, **options) + tensors["residual"]
    loss = projection_loss(hidden, problem.teacher, projection_of(tensors), backend=backend)
    return hidden, loss


def _eager(problem: Problem, tensors: Mapping[str, Tensor], seed: Tensor | None):
    """What PEFT computes, and the mean squared error of the projection in fp32. No seed: no mask.

    Without one the dropout is left out, which is how the function is checked.
    """
    x = kept = tensors["x"]
    if seed is not None:
        kept = F.dropout(x, problem.dropout)
    part = F.linear(F.linear(kept, tensors["lora_a"]), tensors["lora_b"]) * SCALING
    hidden = F.linear(x, problem.weight) + part + tensors["residual"]
    z = hidden
    for name in ("p", "p_a", "p_b"):
        z = F.linear(z, tensors[name]) if name in tensors else z
    return hidden, F.mse_loss(z.float(), problem.teacher.float())


def _candidate(
    case: Case, problem: Problem, name: str, forward: Forward, budget=BUDGET, truth=None
) -> Candidate:
    tensors = problem.leaves(case.dtype)
    seed = torch.tensor(_SEED, device=case.device)
    # peers with a truth of their own are checked without the mask that a seed asks for
    return Candidate(
        name,
        _step(problem, tensors, forward, seed),
        ("hidden", "loss", *problem.gradients.values()),
        FLOOR,
        work(problem),
        weights=(problem.weight, *(t for n, t in tensors.items() if n not in ("x", "residual"))),
        budget=budget,
        check_step=_step(problem, tensors, forward, None) if truth else None,
        truth=truth,
    )


def _step(
    problem: Problem, tensors: Mapping[str, Tensor], forward: Forward, seed: Tensor | None
) -> Callable[[], Mapping[str, Tensor]]:
    leaves = {problem.gradients[name]: tensor for name, tensor in tensors.items()}
    return forward_backward(
        lambda: forward(tensors, seed), ("hidden", "loss"), problem.upstream, leaves
    )


def _problem(case: Case) -> Problem:
    """Unit x, weights that keep the scale, a LoRA part as large as the base's, a near teacher."""
    dropout = case.options["dropout"]
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout: expected a number in [0, 1), got {dropout}")
    shape, randn, rank = case.shape, Normal(case.device, seed=0), _RANKS[case.variant]
    d_t = shape.N if rank == 0 else shape.D_t
    scaled = lambda *size, factor: randn(*size).mul_(factor).to(case.dtype)
    trained = {
        "x": scaled(shape.M, shape.K, factor=1.0),
        "lora_a": scaled(shape.R, shape.K, factor=shape.K**-0.5),
        "lora_b": scaled(shape.N, shape.R, factor=1.0 / (SCALING * math.sqrt(shape.R))),
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
    teacher = randn(shape.M, d_t).mul_(DELTA)
    problem = Problem(trained, weight, teacher, (dhidden, dloss), dropout)
    wide = {name: tensor.float() for name, tensor in trained.items()}
    plain = dataclasses.replace(problem, weight=weight.float(), dropout=0.0)
    z = _eager(plain, wide, None)[0]
    for name in ("p", "p_a", "p_b"):
        z = F.linear(z, wide[name]) if name in wide else z
    return dataclasses.replace(problem, teacher=teacher.add_(z).to(case.dtype))


def _mask(problem: Problem) -> Tensor | None:
    if problem.dropout == 0.0:
        return None
    x = problem.trained["x"]
    bits = dropout_bits(torch.tensor(_SEED, device=x.device), *x.shape, [problem.dropout])
    return unpack(bits[0], x.shape[1])


def _truth(problem: Problem, mask: Tensor | None) -> dict[str, Tensor]:
    """In fp64, by autograd through the definitions."""
    tensors = problem.leaves(torch.float64)
    dhidden, dloss = problem.upstream
    wide = dataclasses.replace(
        problem, teacher=problem.teacher.double(), upstream=(dhidden.double(), dloss.double())
    )

    def forward(tensors: Mapping[str, Tensor], _: Tensor | None) -> Sequence[Tensor]:
        hidden, rows = lora_projection_loss_reference(
            tensors["x"],
            wide.target(tensors),
            wide.teacher,
            projection_of(tensors),
            None,
            ProjectionSpec("mse", "none", 1.0),
            residual=tensors["residual"],
            kept=mask,
        )
        return hidden, rows.mean()

    return _step(wide, tensors, forward, None)()

"""What a benchmark declares: the module `bench_<room>.py` has `ROOM` and `lineup(case)`.

And what rooms share in doing so: our backends, plain PyTorch, a training step, bare GEMMs.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modxfer_fast.kernels import dispatch, env
from modxfer_fast.kernels.names import BACKENDS
from modxfer_fast.measure.roofline import Work
from modxfer_fast.measure.timing import Step

# Largest relative error (Frobenius norm) of results and gradients that still is the same function.
BUDGET = {torch.float32: 1e-4, torch.float16: 3e-3, torch.bfloat16: 3e-3}
# A candidate that rounds what is wide to half precision, logits or projected states, loses most
# digits of a small difference. That is how it works, not a mistake: it is timed, and its error
# stands beside.
COARSE_BUDGET = {torch.float32: 1e-4, torch.float16: 0.5, torch.bfloat16: 0.5}

Results = Mapping[str, Tensor]  # of a step: results and gradients by name


class Sizes:
    """Base of frozen dataclasses of positive integers, named by dimension."""

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            if value < 1:
                raise ValueError(f"{name}: expected a positive integer, got {value}")

    @classmethod
    def names(cls) -> list[str]:
        return [field.name for field in dataclasses.fields(cls)]


@dataclass(frozen=True)
class States(Sizes):
    """N rows (tokens), D_s and D_t hidden widths."""

    N: int
    D_s: int
    D_t: int


@dataclass(frozen=True)
class Case:
    """One problem: what is computed, where, and in which precision."""

    shape: Sizes
    dtype: torch.dtype
    device: str
    variant: str
    options: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Room:
    """Names by which the command line asks for a problem.

    Attributes:
        shapes: named sizes; every value of the same subclass of `Sizes`.
        default_shape: name of the shape on "cpu" and on "cuda".
        axis: what the variants are, as rows call it: "divergence", "loss", "targets".
        variants: one problem each on the same shape; the first is the default.
        options: further numbers of a problem with their defaults.
    """

    shapes: Mapping[str, Sizes]
    default_shape: Mapping[str, str]
    axis: str
    variants: tuple[str, ...]
    options: Mapping[str, float] = field(default_factory=dict)

    @property
    def sizes(self) -> type[Sizes]:
        """What the command line may change of a shape."""
        return type(next(iter(self.shapes.values())))

    def shape(self, name: str) -> Sizes:
        if name not in self.shapes:
            raise ValueError(f"shape: expected one of {', '.join(self.shapes)}, got {name!r}")
        return self.shapes[name]

    def check_variant(self, name: str) -> None:
        if name not in self.variants:
            raise ValueError(
                f"{self.axis}: expected one of {', '.join(self.variants)}, got {name!r}"
            )

    def problem(self, case: Case) -> dict[str, int | float | str]:
        """Sizes, variant and options as rows tell them."""
        return dataclasses.asdict(case.shape) | {self.axis: case.variant} | dict(case.options)


@dataclass(frozen=True)
class Floor:
    """What an implementation is compared with.

    Attributes:
        step: the least that must be done, into preallocated outputs; or, where there are
            `weights`, a forward and backward as a candidate's, whose memory is of interest too.
        work: what it does.
        weights: as a candidate's.
    """

    step: Step
    work: Work
    weights: Sequence[Tensor] = ()


@dataclass(frozen=True)
class Candidate:
    """An implementation that takes part.

    Attributes:
        step: one forward and backward; returns results and gradients and keeps none. None where it
            cannot run.
        floor: name of the floor it is compared with.
        work: of the formula that it computes; None for the floor's.
        steps: of its kernels one after another, where they are known; their time is predicted.
        weights: parameters, which do not count as saved for the backward.
        budget: largest relative error by dtype.
        outputs: the names that `step` must return; None for all that the truth has.
        check_step: what is checked in place of `step`, where `step` draws random numbers.
        truth: what it is checked against in place of the line-up's.
        why_not: the reason when `step` is None.
    """

    name: str
    step: Callable[[], Results | None] | None
    floor: str
    work: Work | None = None
    steps: Sequence[Work] = ()
    weights: Sequence[Tensor] = ()
    budget: Mapping[torch.dtype, float] = field(default_factory=lambda: BUDGET)
    outputs: Sequence[str] | None = None
    check_step: Callable[[], Results] | None = None
    truth: Callable[[], Results] | None = None
    why_not: str = ""

    @property
    def is_ours(self) -> bool:
        return self.name.startswith("ours")


@dataclass(frozen=True)
class Lineup:
    """Who takes part in a case.

    Attributes:
        problem: sizes, variant and options as rows tell them.
        floors: what implementations are compared with, by name.
        truth: in fp64.
        graphs: on a GPU each candidate is also timed as a CUDA graph: the step is so short that
            Python's launches may take longer.
    """

    problem: Mapping[str, int | float | str]
    candidates: list[Candidate]
    floors: Mapping[str, Floor]
    truth: Callable[[], Results]
    graphs: bool = False


def names() -> list[str]:
    """Every room that has a benchmark."""
    files = Path(__file__).parent.glob("bench_*.py")
    return sorted(file.stem.removeprefix("bench_") for file in files)


def our_backends(room: str, case: Case) -> list[str]:
    """Backends of the room that run such inputs here.

    Triton's interpreter is for tests; its times would say nothing.
    """
    return [
        name
        for name in BACKENDS
        if not (name == "triton" and env.triton_interpreted())
        and dispatch.availability(room, name)[0]
        and dispatch.load(room, name).supports(case.device, (case.dtype,))[0]
    ]


def ours(room: str, case: Case, function: Callable, **options: Any) -> dict[str, Callable]:
    """Our function with each backend, by the name of its row."""
    return {
        f"ours {backend}": functools.partial(function, **options, backend=backend)
        for backend in our_backends(room, case)
    }


def plain(function: Callable, **options: Any) -> dict[str, Callable]:
    """What a user of plain PyTorch writes, as it is and compiled, by the name of its row."""
    compiled = torch.compile(function, dynamic=False)
    return {
        "eager": functools.partial(function, **options),
        "torch.compile": functools.partial(compiled, **options),
    }


def training_step(
    forward: Callable[[], Tensor | Sequence[Tensor]],
    leaves: Mapping[str, Tensor],
    outputs: Sequence[str] = ("loss",),
    upstream: Sequence[Tensor] | None = None,
) -> Callable[[], dict[str, Tensor]]:
    """One forward and backward as a training loop does it, gradients set to None.

    Args:
        leaves: the tensors whose gradients are wanted, by the name of the gradient; one whose
            gradient stays None is left out.
        outputs: names of what `forward` returns.
        upstream: gradients of the outputs; None for a scalar.
    """

    def step() -> dict[str, Tensor]:
        made = forward()
        made = (made,) if isinstance(made, Tensor) else made
        torch.autograd.backward(made, upstream)
        results = {name: output.detach() for name, output in zip(outputs, made, strict=True)}
        for name, leaf in leaves.items():
            if leaf.grad is not None:
                results[name], leaf.grad = leaf.grad, None
        return results

    return step


def with_outputs(factors: Iterable[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(left, right, out) of products left @ right of matrices or of batches of them."""
    return [(a, b, a.new_empty(*a.shape[:-1], b.shape[-1])) for a, b in factors]


def gemms(products: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Floor:
    """Bare products, each of which reads two matrices and writes the third."""

    def step() -> None:
        for left, right, out in products:
            (torch.mm if left.dim() == 2 else torch.bmm)(left, right, out=out)

    flops = sum(2 * left.numel() * right.shape[-1] for left, right, _ in products)
    return Floor(
        step, Work(flops, sum(matrix.nbytes for factors in products for matrix in factors))
    )


class Normal:
    """Standard normal numbers [*size] in fp32."""

    def __init__(self, device: str, seed: int = 0):
        self._generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, *size: int) -> Tensor:
        return torch.randn(size, generator=self._generator, device=self._generator.device)

"""Correlation of every student feature with every teacher feature, from a stream of tokens.

"cross" is the correlation alone, "cross+grams" the covariances within both sides too. A row named
"update" adds N tokens to a stream that is running; the others begin with nothing and end with the
correlation. The floor multiplies centred fp32 rows that it is given. scikit-learn takes one student
feature a call, and minutes for all of them: it gets one in _SAMPLE.

FLOPs of the formula: 2 N D_s D_t, and N (D_s^2 + D_t^2) for two symmetric matrices, of which the
floor's products make both halves. Bytes of the formula, b per feature: both sides are read once,
the fp64 sums read and written. The floor reads fp32 and writes fp32.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.candidates import our_backends
from benchmarks.harness import Candidate, Floor, Lineup
from benchmarks.inputs import Normal
from benchmarks.peers import label, r_regression
from benchmarks.roofline import Work
from benchmarks.rooms import Case, Room
from benchmarks.shapes import Sizes
from modxfer_fast.kernels.correlation import StreamingMoments

CROSS, GRAMS = "cross", "cross+grams"
_SAMPLE = 32
FLOORS = {CROSS: "gemm", GRAMS: "gemms x3"}


@dataclass(frozen=True)
class Shape(Sizes):
    """N rows (tokens), D_s and D_t features."""

    N: int
    D_s: int
    D_t: int


ROOM = Room(
    shapes={
        "smoke": Shape(64, 32, 48),
        # BERT-base against BERT-large, as many tokens as the maps of the paper are fitted from
        "cpu-gate": Shape(4000, 768, 1024),
        "minilm": Shape(4000, 256, 384),
        "llama3-1b-from-8b": Shape(16384, 2048, 4096),
    },
    default_shape={"cpu": "cpu-gate", "cuda": "llama3-1b-from-8b"},
    axis="products",
    variants=(CROSS, GRAMS),
)


def lineup(case: Case) -> Lineup:
    student, teacher = _inputs(case.shape, case.dtype, case.device)
    floor, work = FLOORS[case.variant], _formula(case)
    outputs = _outputs(case.variant)
    candidates = []
    for backend in our_backends("correlation", case.device, case.dtype):
        stream = _stream(case, backend)

        def whole(backend=backend) -> dict[str, Tensor]:
            new = _stream(case, backend)
            new.update([student], [teacher])
            return _results(new)

        def update(stream=stream) -> dict[str, Tensor]:
            stream.update([student], [teacher])
            return {}

        name = f"ours {backend}"
        candidates.append(
            Candidate(f"{name}, update", update, outputs, floor, work, check_step=whole)
        )
        candidates.append(Candidate(name, whole, outputs, floor, work))
    for name, function in (("eager", dense_moments), ("torch.corrcoef", corrcoef_moments)):
        step = _step(function, student, teacher, case.variant)
        candidates.append(Candidate(name, step, outputs, floor, work))
    if case.variant == CROSS:
        candidates.append(_r_regression(student, teacher, floor, work))
    truth = lambda: dense_moments(student.double(), teacher.double(), GRAMS)
    problem = {
        "N": case.shape.N,
        "D_s": case.shape.D_s,
        "D_t": case.shape.D_t,
        "products": case.variant,
    }
    return Lineup(problem, candidates, {floor: _floor(case, student, teacher)}, truth)


def dense_moments(student: Tensor, teacher: Tensor, variant: str) -> dict[str, Tensor]:
    """All rows at once, as plain PyTorch is written; half precision is widened."""
    rows = student.shape[0]
    x, y = (_widened(features) for features in (student, teacher))
    x, y = x - x.mean(0), y - y.mean(0)
    correlation = x.t() @ y / torch.outer(x.norm(dim=0), y.norm(dim=0))
    results = {"correlation": correlation}
    if variant == GRAMS:
        results |= {"cov_xx": x.t() @ x / rows, "cov_yy": y.t() @ y / rows}
    return results


def corrcoef_moments(student: Tensor, teacher: Tensor, variant: str) -> dict[str, Tensor]:
    """One symmetric matrix over the features of both sides."""
    width = student.shape[1]
    rows = torch.cat([_widened(student), _widened(teacher)], 1).t()
    if variant == CROSS:
        return {"correlation": torch.corrcoef(rows)[:width, width:]}
    cov = torch.cov(rows, correction=0)
    std = cov.diagonal().sqrt()
    return {
        "correlation": (cov / std / std[:, None])[:width, width:],
        "cov_xx": cov[:width, :width],
        "cov_yy": cov[width:, width:],
    }


def _widened(features: Tensor) -> Tensor:
    return features.to(torch.promote_types(features.dtype, torch.float32))


def _step(
    function: Callable[[Tensor, Tensor, str], dict[str, Tensor]],
    student: Tensor,
    teacher: Tensor,
    variant: str,
) -> Callable[[], dict[str, Tensor]]:
    return lambda: function(student, teacher, variant)


def _r_regression(student: Tensor, teacher: Tensor, floor: str, work: Work) -> Candidate:
    """scikit-learn's Pearson correlation of one target at a time, for a sample of the targets."""
    chosen = slice(None, None, _SAMPLE)
    name = f"{label('scikit-learn', 'r_regression')}, 1 of {_SAMPLE} student features"
    options = {
        "work": Work(work.flops // _SAMPLE, work.bytes // _SAMPLE),
        "truth": lambda: dense_moments(student[:, chosen].double(), teacher.double(), CROSS),
    }
    function, why_not = r_regression()
    if function is None or student.device.type != "cpu":
        why_not = why_not or "runs on a CPU"
        return Candidate(name, None, _outputs(CROSS), floor, why_not=why_not, **options)
    x, y = _widened(student[:, chosen]).numpy(), _widened(teacher).numpy()

    def step() -> dict[str, Tensor]:
        columns = [torch.from_numpy(function(y, column)) for column in x.T]
        return {"correlation": torch.stack(columns)}

    return Candidate(name, step, _outputs(CROSS), floor, **options)


def _inputs(shape: Shape, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """Features with means of their own; the teacher's share half of their variance."""
    randn = Normal(device, seed=0)
    student = randn(shape.N, shape.D_s)
    columns = torch.arange(shape.D_t, device=device) % shape.D_s
    teacher = randn(shape.N, shape.D_t) + student[:, columns]
    return (student + randn(shape.D_s)).to(dtype), (teacher + randn(shape.D_t)).to(dtype)


def _outputs(variant: str) -> tuple[str, ...]:
    return ("correlation",) if variant == CROSS else ("correlation", "cov_xx", "cov_yy")


def _stream(case: Case, backend: str) -> StreamingMoments:
    grams = case.variant == GRAMS
    return StreamingMoments(
        [case.shape.D_s],
        [case.shape.D_t],
        [(0, 0)],
        gram_x=grams,
        gram_y=grams,
        device=case.device,
        backend=backend,
    )


def _results(stream: StreamingMoments) -> Mapping[str, Tensor]:
    moments = stream.moments(0, 0)
    results = {"correlation": moments.correlation()}
    if moments.cov_xx is not None:
        results |= {"cov_xx": moments.cov_xx, "cov_yy": moments.cov_yy}
    return results


def _floor(case: Case, student: Tensor, teacher: Tensor) -> Floor:
    """Bare products of centred fp32 rows into matrices that exist."""
    x, y = (features.float() - features.float().mean(0) for features in (student, teacher))
    factors = [(x, y)] if case.variant == CROSS else [(x, y), (x, x), (y, y)]
    outs = [x.new_empty(a.shape[1], b.shape[1]) for a, b in factors]

    def products() -> None:
        for (a, b), out in zip(factors, outs, strict=True):
            torch.mm(a.t(), b, out=out)

    made = sum(out.numel() for out in outs)
    read = sum(a.numel() + b.numel() for a, b in factors)
    return Floor(products, Work(2 * case.shape.N * made, 4 * (read + made)))


def _formula(case: Case) -> Work:
    n, d_s, d_t = case.shape.N, case.shape.D_s, case.shape.D_t
    flops, sums = 2 * n * d_s * d_t, d_s * d_t
    if case.variant == GRAMS:
        flops += n * (d_s**2 + d_t**2)
        sums += d_s**2 + d_t**2
    return Work(flops, n * (d_s + d_t) * case.dtype.itemsize + 2 * 8 * sums)

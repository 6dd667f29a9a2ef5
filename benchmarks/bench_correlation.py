"""Correlation of every student feature with every teacher feature, from a stream of tokens.

"cross" is the correlation alone, "cross+grams" the covariances within both sides too. A row named
"update" adds N tokens to sums that exist; the others begin with nothing and end with the
correlation. The floor multiplies centred fp32 rows that it is given. scikit-learn takes one student
feature a call, and minutes for all of them: it gets one in _SAMPLE.

FLOPs of the formula: 2 N D_s D_t, and N (D_s^2 + D_t^2) for two symmetric matrices, of which the
floor's products make both halves. Bytes of the formula, b per feature: both sides are read once,
the fp64 sums read and written. The floor reads fp32 and writes fp32.
"""

import functools

import torch
from torch import Tensor

from benchmarks import peers, rooms
from benchmarks.rooms import Candidate, Case, Floor, Lineup, States
from modxfer_fast.kernels import correlation
from modxfer_fast.kernels.correlation.op import MAX_ROWS
from modxfer_fast.measure.roofline import Work

CROSS, GRAMS = "cross", "cross+grams"
_SAMPLE = 32
FLOORS = {CROSS: "gemm", GRAMS: "gemms x3"}


ROOM = rooms.Room(
    shapes={
        "smoke": States(64, 32, 48),
        # BERT-base against BERT-large, as many tokens as the maps of the paper are fitted from
        "cpu-gate": States(4000, 768, 1024),
        "minilm": States(4000, 256, 384),
        "llama3-1b-from-8b": States(16384, 2048, 4096),
    },
    default_shape={"cpu": "cpu-gate", "cuda": "llama3-1b-from-8b"},
    axis="products",
    variants=(CROSS, GRAMS),
)


def lineup(case: Case) -> Lineup:
    student, teacher = _inputs(case)
    floor, work = FLOORS[case.variant], _formula(case)
    candidates = []
    for backend in rooms.our_backends("correlation", case):
        running = Sums(case, backend)

        def whole(backend=backend) -> rooms.Results:
            new = Sums(case, backend)
            new.update(student, teacher)
            return new.moments()

        name, update = f"ours {backend}", functools.partial(running.update, student, teacher)
        candidates.append(Candidate(f"{name}, update", update, floor, work, check_step=whole))
        candidates.append(Candidate(name, whole, floor, work))
    for name, function in (("eager", dense_moments), ("torch.corrcoef", corrcoef_moments)):
        step = functools.partial(function, student, teacher, case.variant)
        candidates.append(Candidate(name, step, floor, work))
    if case.variant == CROSS:
        candidates.append(_r_regression(student, teacher, floor, work))
    truth = lambda: dense_moments(student.double(), teacher.double(), case.variant)
    floors = {floor: _floor(case, student, teacher)}
    return Lineup(ROOM.problem(case), candidates, floors, truth)


class Sums:
    """What the room's kernels add up of rows that come, about the mean of the first MAX_ROWS."""

    def __init__(self, case: Case, backend: str):
        widths, device = (case.shape.D_s, case.shape.D_t), case.device
        double = functools.partial(torch.zeros, dtype=torch.float64, device=device)
        self.count, self._backend = 0, backend
        self._shifts: list[Tensor] = []
        self.sums = [double(2, width) for width in widths]
        self.product = double(*widths)
        self.grams = [double(width, width) for width in widths if case.variant == GRAMS]
        self._centred = [torch.empty(MAX_ROWS, width, device=device) for width in widths]

    def update(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> None:
        """Adds the rows that count; see `correlation_centre`."""
        for chunk in range(0, student.shape[0], MAX_ROWS):
            rows = slice(chunk, chunk + MAX_ROWS)
            self._add([student[rows], teacher[rows]], None if mask is None else mask[rows])
        self.count += student.shape[0] if mask is None else mask.sum()

    def _add(self, sites: list[Tensor], mask: Tensor | None) -> None:
        if not self._shifts:
            kept = [x if mask is None else x[mask] for x in sites]
            self._shifts = [x.double().mean(0).float().double() for x in kept]
        centred = [out[: len(sites[0])] for out in self._centred]
        for x, shift, out, sums in zip(sites, self._shifts, centred, self.sums, strict=True):
            correlation.correlation_centre(x, shift, out, sums, mask=mask, backend=self._backend)
        correlation.correlation_product(*centred, self.product, backend=self._backend)
        for x, gram in zip(centred, self.grams, strict=False):
            correlation.correlation_gram(x, gram, backend=self._backend)

    def moments(self) -> rooms.Results:
        """The correlation, and the covariances within both sides where there are grams."""
        means, squares = zip(*(sums / self.count for sums in self.sums), strict=True)
        stds = [(m2 - mean.square()).sqrt() for mean, m2 in zip(means, squares, strict=True)]
        cov = self.product / self.count - torch.outer(*means)
        results = {"correlation": cov / torch.outer(*stds)}
        for name, gram, mean in zip(("cov_xx", "cov_yy"), self.grams, means, strict=False):
            symmetric = gram.triu() + gram.triu(1).t()
            results[name] = symmetric / self.count - torch.outer(mean, mean)
        return results


def dense_moments(student: Tensor, teacher: Tensor, variant: str) -> rooms.Results:
    """All rows at once, as plain PyTorch is written; half precision is widened."""
    rows = student.shape[0]
    x, y = (features - features.mean(0) for features in map(_widened, (student, teacher)))
    grams = {"cov_xx": x.t() @ x / rows, "cov_yy": y.t() @ y / rows} if variant == GRAMS else {}
    return {"correlation": x.t() @ y / torch.outer(x.norm(dim=0), y.norm(dim=0)), **grams}


def corrcoef_moments(student: Tensor, teacher: Tensor, variant: str) -> rooms.Results:
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


def _r_regression(student: Tensor, teacher: Tensor, floor: str, work: Work) -> Candidate:
    """scikit-learn's Pearson correlation of one target at a time, for a sample of the targets."""
    sample = student[:, ::_SAMPLE]
    work = Work(work.flops // _SAMPLE, work.bytes // _SAMPLE)
    truth = lambda: dense_moments(sample.double(), teacher.double(), CROSS)
    function, why_not = peers.find("scikit-learn", "sklearn.feature_selection", "r_regression")
    if student.device.type != "cpu":
        why_not = why_not or "runs on a CPU"
    step = None
    if not why_not:
        x, y = _widened(sample).numpy(), _widened(teacher).numpy()

        def step() -> rooms.Results:
            columns = [torch.from_numpy(function(y, column)) for column in x.T]
            return {"correlation": torch.stack(columns)}

    name = f"{peers.label('scikit-learn', 'r_regression')}, 1 of {_SAMPLE} student features"
    return Candidate(name, step, floor, work, truth=truth, why_not=why_not)


def _inputs(case: Case) -> tuple[Tensor, Tensor]:
    """Features with means of their own; the teacher's share half of their variance."""
    shape, randn = case.shape, rooms.Normal(case.device)
    student = randn(shape.N, shape.D_s)
    columns = torch.arange(shape.D_t, device=case.device) % shape.D_s
    teacher = randn(shape.N, shape.D_t) + student[:, columns]
    student, teacher = student + randn(shape.D_s), teacher + randn(shape.D_t)
    return student.to(case.dtype), teacher.to(case.dtype)


def _floor(case: Case, student: Tensor, teacher: Tensor) -> Floor:
    """Of centred fp32 rows."""
    x, y = (features.float() - features.float().mean(0) for features in (student, teacher))
    factors = [(x.t(), y)] if case.variant == CROSS else [(x.t(), y), (x.t(), x), (y.t(), y)]
    return rooms.gemms(rooms.with_outputs(factors))


def _formula(case: Case) -> Work:
    n, d_s, d_t = case.shape.N, case.shape.D_s, case.shape.D_t
    flops, sums = 2 * n * d_s * d_t, d_s * d_t
    if case.variant == GRAMS:
        flops += n * (d_s**2 + d_t**2)
        sums += d_s**2 + d_t**2
    return Work(flops, n * (d_s + d_t) * case.dtype.itemsize + 2 * 8 * sums)

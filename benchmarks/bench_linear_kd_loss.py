"""linear_kd_loss, forward and backward, against peers and the bare GEMMs.

FLOPs of formula and floor: 2 N V (3 D_s + D_t) trainable, 2 N V (2 D_s + D_t) with a frozen
student's head. Bytes of the formula, b per element: both hidden states and both heads are read,
dhidden and dweight written; the floor also writes z_s and z_t and reads dz once or twice.
"""

import dataclasses
import functools

import torch

from benchmarks.candidates import dense_divergence, divergence_columns, our_backends, training_step
from benchmarks.dense import dense_linear_kd_loss
from benchmarks.harness import COARSE_BUDGET, Candidate, Floor, Lineup
from benchmarks.inputs import LinearInputs, linear_inputs, linear_truth
from benchmarks.peers import beta_of, label, liger_chunked_jsd, trl_chunked_divergence
from benchmarks.rooms import Case, Room
from benchmarks.shapes import DEFAULT, SHAPES, Shape
from modxfer_fast import linear_kd_loss
from modxfer_fast.kernels.common import KDSpec
from modxfer_fast.kernels.divergences import DIVERGENCES
from modxfer_fast.measure.roofline import Work

ROOM = Room(SHAPES, DEFAULT, axis="divergence", variants=tuple(DIVERGENCES), options={"beta": 0.5})
TRAINABLE, FROZEN = "gemms x4", "gemms x3, frozen head"
_OUTPUTS = ("loss", "dhidden", "dweight")


def lineup(case: Case) -> Lineup:
    inputs = linear_inputs(case.shape, case.dtype, case.device)
    divergence = divergence_columns(case)
    spec = KDSpec(case.variant, divergence.get("beta")).checked()
    candidates = [
        *_ours(case, inputs),
        _eager(case, inputs),
        _compiled(case, inputs),
        _liger(case, inputs),
        _trl(case, inputs),
    ]
    problem = dataclasses.asdict(case.shape) | divergence
    return Lineup(problem, candidates, floors(inputs), lambda: linear_truth(inputs, spec))


def work(shape: Shape, element_bytes: int, frozen: bool) -> Work:
    """Of the formula: no logits anywhere."""
    student, teacher = (1 if frozen else 2) * shape.V + 2 * shape.N, shape.V + shape.N
    return Work(
        flops=2 * shape.N * shape.V * ((2 if frozen else 3) * shape.D_s + shape.D_t),
        bytes=element_bytes * (student * shape.D_s + teacher * shape.D_t),
    )


def floors(inputs: LinearInputs) -> dict[str, Floor]:
    """The GEMMs alone, each into its own preallocated output."""
    h_s, w_s, h_t, w_t = inputs
    z_s = h_s.new_empty(h_s.shape[0], w_s.shape[0])
    z_t = torch.empty_like(z_s)
    dz = torch.randn_like(z_s)
    dhidden, dweight = torch.empty_like(h_s), torch.empty_like(w_s)

    def frozen() -> None:
        torch.mm(h_s, w_s.t(), out=z_s)
        torch.mm(h_t, w_t.t(), out=z_t)
        torch.mm(dz, w_s, out=dhidden)

    def trainable() -> None:
        frozen()
        torch.mm(dz.t(), h_s, out=dweight)

    shape = Shape(*h_s.shape, h_t.shape[1], w_s.shape[0])
    size, logits = h_s.element_size(), z_s.numel() * h_s.element_size()
    floors = {}
    for name, step, is_frozen in ((TRAINABLE, trainable, False), (FROZEN, frozen, True)):
        formula = work(shape, size, is_frozen)
        traffic = formula.bytes + (3 if is_frozen else 4) * logits
        # a product of its own each: the second and third read the student's operands again
        again = size * w_s.numel() + (0 if is_frozen else size * h_s.numel())
        floors[name] = Floor(step, Work(formula.flops, traffic + again))
    return floors


def _ours(case: Case, inputs: LinearInputs) -> list[Candidate]:
    candidates = []
    for backend in our_backends("linear_kd_loss", case.device, case.dtype):

        def loss(h_s, w_s, h_t, w_t, backend=backend):
            return linear_kd_loss(h_s, w_s, h_t, w_t, **divergence_columns(case), backend=backend)

        for suffix, frozen in (("", False), (", frozen head", True)):
            candidates.append(_candidate(case, inputs, f"ours {backend}{suffix}", loss, frozen))
    return candidates


def _eager(case: Case, inputs: LinearInputs) -> Candidate:
    loss = functools.partial(dense_linear_kd_loss, **dense_divergence(case))
    return _candidate(case, inputs, "eager", loss, budget=COARSE_BUDGET)


def _compiled(case: Case, inputs: LinearInputs) -> Candidate:
    compiled = torch.compile(dense_linear_kd_loss, dynamic=False)
    loss = functools.partial(compiled, **dense_divergence(case))
    return _candidate(case, inputs, "torch.compile", loss, budget=COARSE_BUDGET)


def _liger(case: Case, inputs: LinearInputs) -> Candidate:
    jsd_class, why_not = liger_chunked_jsd(case.variant)
    loss = None
    if jsd_class is not None:
        # no hard loss: only the divergence is compared; all else is Liger's default
        jsd = jsd_class(
            weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta_of(**divergence_columns(case))
        )
        labels = torch.zeros(case.shape.N, dtype=torch.int64, device=case.device)
        loss = lambda *tensors: jsd(*tensors, labels)
    name = label("liger-kernel", "liger chunked")
    return _candidate(case, inputs, name, loss, budget=COARSE_BUDGET, why_not=why_not)


def _trl(case: Case, inputs: LinearInputs) -> Candidate:
    function, why_not = trl_chunked_divergence(case.variant)
    loss = None
    if function is not None:
        beta = beta_of(**divergence_columns(case))

        def loss(h_s, w_s, h_t, w_t):
            divergence, _ = function.apply(h_s, w_s, None, h_t, w_t, None, beta)
            return divergence.mean()

    return _candidate(case, inputs, label("trl", "trl chunked"), loss, why_not=why_not)


def _candidate(
    case: Case, inputs: LinearInputs, name: str, loss, frozen: bool = False, **options
) -> Candidate:
    """`loss` of hidden states and heads, None where it cannot run, as a training step."""
    hidden = inputs.student_hidden.detach().requires_grad_()
    weight = inputs.student_weight.detach().requires_grad_(not frozen)
    tensors = (hidden, weight, inputs.teacher_hidden, inputs.teacher_weight)
    leaves = {"dhidden": hidden, "dweight": weight}
    return Candidate(
        name,
        loss and training_step(lambda: loss(*tensors), leaves),
        _OUTPUTS[:2] if frozen else _OUTPUTS,
        FROZEN if frozen else TRAINABLE,
        work(case.shape, case.dtype.itemsize, frozen),
        weights=(inputs.student_weight, inputs.teacher_weight),
        **options,
    )

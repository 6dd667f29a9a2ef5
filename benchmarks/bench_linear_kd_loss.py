"""linear_kd_loss, forward and backward, against peers and the bare GEMMs.

FLOPs of the floor: 2 N V (3 D_s + D_t) trainable, 2 N V (2 D_s + D_t) with a frozen student's head.
"""

import torch
from torch import Tensor

from modxfer_fast import linear_kd_loss
from modxfer_fast.kernels.common import KDSpec

from .candidates import our_backends, training_step
from .dense import dense_linear_kd_loss
from .harness import Candidate, Case, Lineup
from .inputs import LinearInputs, linear_inputs, linear_truth
from .peers import beta_of, label, liger_chunked_jsd, trl_chunked_divergence
from .timing import Step

TRAINABLE, FROZEN = "gemms x4", "gemms x3, frozen head"
_OUTPUTS = ("loss", "dhidden", "dweight")


def lineup(case: Case) -> Lineup:
    inputs = linear_inputs(case.shape, case.dtype, case.device)
    spec = KDSpec.checked(case.divergence, case.beta, 1.0, 1.0, 0.0, False)
    candidates = [
        *_ours(case, inputs),
        _eager(case, inputs),
        _compiled(case, inputs),
        _liger(case, inputs),
        _trl(case, inputs),
    ]
    return Lineup(candidates, floors(inputs), lambda: linear_truth(inputs, spec))


def floors(inputs: LinearInputs) -> dict[str, Step]:
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

    return {TRAINABLE: trainable, FROZEN: frozen}


def _ours(case: Case, inputs: LinearInputs) -> list[Candidate]:
    candidates = []
    for backend in our_backends("linear_kd_loss", case.device, case.dtype):

        def loss(h_s, w_s, h_t, w_t, backend=backend):
            return linear_kd_loss(
                h_s, w_s, h_t, w_t, divergence=case.divergence, beta=case.beta, backend=backend
            )

        candidates.append(
            Candidate(f"ours {backend}", _step(loss, inputs), _OUTPUTS, floor=TRAINABLE)
        )
        candidates.append(
            Candidate(
                f"ours {backend}, frozen head",
                _step(loss, inputs, frozen=True),
                _OUTPUTS[:2],
                floor=FROZEN,
            )
        )
    return candidates


def _eager(case: Case, inputs: LinearInputs) -> Candidate:
    def loss(*tensors: Tensor) -> Tensor:
        return dense_linear_kd_loss(*tensors, case.divergence, case.beta)

    return Candidate("eager", _step(loss, inputs), _OUTPUTS, TRAINABLE, fp32_logits=False)


def _compiled(case: Case, inputs: LinearInputs) -> Candidate:
    compiled = torch.compile(dense_linear_kd_loss, dynamic=False)

    def loss(*tensors: Tensor) -> Tensor:
        return compiled(*tensors, case.divergence, case.beta)

    return Candidate("torch.compile", _step(loss, inputs), _OUTPUTS, TRAINABLE, fp32_logits=False)


def _liger(case: Case, inputs: LinearInputs) -> Candidate:
    name = label("liger-kernel", "liger chunked")
    jsd_class, why_not = liger_chunked_jsd()
    step = None
    if jsd_class is not None:
        # no hard loss: only the divergence is compared; all else is Liger's default
        jsd = jsd_class(
            weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta_of(case.divergence, case.beta)
        )
        labels = torch.zeros(case.shape.N, dtype=torch.int64, device=case.device)
        step = _step(lambda *tensors: jsd(*tensors, labels), inputs)
    return Candidate(name, step, _OUTPUTS, TRAINABLE, fp32_logits=False, why_not=why_not)


def _trl(case: Case, inputs: LinearInputs) -> Candidate:
    name = label("trl", "trl chunked")
    function, why_not = trl_chunked_divergence()
    step = None
    if function is not None:
        beta = beta_of(case.divergence, case.beta)

        def loss(h_s, w_s, h_t, w_t):
            divergence, _ = function.apply(h_s, w_s, None, h_t, w_t, None, beta)
            return divergence.mean()

        step = _step(loss, inputs)
    return Candidate(name, step, _OUTPUTS, TRAINABLE, why_not=why_not)


def _step(loss, inputs: LinearInputs, frozen: bool = False):
    hidden = inputs.student_hidden.detach().requires_grad_()
    weight = inputs.student_weight.detach().requires_grad_(not frozen)
    tensors = (hidden, weight, inputs.teacher_hidden, inputs.teacher_weight)
    return training_step(lambda: loss(*tensors), {"dhidden": hidden, "dweight": weight})

"""The objective, fused and dense, for every divergence."""

import pytest
import torch

from modxfer_fast.engine import DistillConfig, Objective
from modxfer_fast.kernels.common import Bend
from modxfer_fast.kernels.common.head import Head
from modxfer_fast.kernels.divergences import DIVERGENCES, FORMULAS
from modxfer_fast.kernels.names import GRADIENTS
from tests.inputs import linear_inputs
from tests.support.gemms import gemms

CASES = [(name, None) for name in DIVERGENCES]
CASES += [("jsd", b) for b in (0.0, 0.3, 1.0)]


@pytest.mark.parametrize(
    "hard", [{}, {"label_smoothing": 0.1, "z_loss_weight": 0.01}], ids=["plain", "hard"]
)
@pytest.mark.parametrize("bends", [(Bend(), Bend()), (Bend(0.5), Bend(1.0, 4.0))], ids=str)
@pytest.mark.parametrize(("divergence", "beta"), CASES)
def test_dense_is_the_fused_loss_written_out(divergence, beta, bends, hard):
    inputs = linear_inputs(9, 50, delta=1.0, labels=True, bias=True)
    terms, grads = [], []
    for impl in ("fused", "dense"):
        objective = Objective(
            *(divergence, beta, 2.0, 0.7, 0.4),
            scale_by_temperature_squared=True,
            impl=impl,
            **hard,
        )
        terms.append(
            objective.terms(
                Head(inputs.student_hidden[None], inputs.student_weight, inputs.student_bias),
                Head(inputs.teacher_hidden[None], inputs.teacher_weight, inputs.teacher_bias),
                inputs.labels[None],
                normalizer=5,
                num_valid=None,
                bends=bends,
            )
        )
        grads.append(torch.autograd.grad(terms[-1].loss, list(inputs.trainable().values())))
    torch.testing.assert_close(*terms)
    torch.testing.assert_close(*grads)


def test_gradients_are_made_when_the_options_say(tmp_path):
    inputs = linear_inputs(9, 50, labels=True)
    products = {}
    for gradients in GRADIENTS:
        objective = DistillConfig(output_dir=str(tmp_path), gradients=gradients).objective()
        args = (
            Head(inputs.student_hidden[None], inputs.student_weight),
            Head(inputs.teacher_hidden[None], inputs.teacher_weight),
            *(inputs.labels[None], None, None),
        )
        losses = []
        forward = gemms(lambda o=objective, a=args, kept=losses: kept.append(o.terms(*a).loss))
        products[gradients] = len(forward), len(gemms(losses[0].backward))
    assert products == {"forward": (4, 0), "recompute": (2, 4)}


def test_help_has_every_formula():
    field = DistillConfig.__dataclass_fields__["divergence"]
    assert FORMULAS in field.metadata["help"]

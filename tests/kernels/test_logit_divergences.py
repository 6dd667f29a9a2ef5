"""`logits_mse` and `logits_cosine`: what only divergences of the logits themselves have.

Values and gradients are those of every divergence (test_kd_loss_oracle.py and others).
"""

import re

import pytest
import torch

from modxfer_fast import (
    TeacherHead,
    TeacherLogits,
    TeacherLogProbs,
    TeacherMixture,
    TeacherProbs,
    TeacherTopK,
    kd_loss,
    linear_kd_loss,
)
from tests.inputs import BACKENDS, close_logits, linear_inputs

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]
INF = float("inf")
OF_LOGITS = ["logits_mse", "logits_cosine"]


def rows_and_gradient(student, teacher, divergence, backend, **options):
    leaf = student.detach().clone().requires_grad_()
    rows = kd_loss(
        leaf, teacher, divergence=divergence, backend=backend, reduction="none", **options
    )
    return rows.detach(), torch.autograd.grad(rows.sum(), leaf)[0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", OF_LOGITS)
@pytest.mark.parametrize("size", [1e-35, 1.0, 1e9])
def test_equal_rows_have_neither_to_the_bit(size, divergence, backend):
    student, _ = close_logits(3, 301)
    student = size * student.detach()
    student[:, ::7] = -INF
    rows, gradient = rows_and_gradient(student, student, divergence, backend, temperature=3.0)
    assert (rows == 0).all()
    assert (gradient == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [1e-35, 1e9, 1e18, 1e30])
def test_a_cosine_has_no_size(size, backend):
    """Nor has it a temperature; its gradient is as much smaller as the logits are larger."""
    student, teacher = close_logits(3, 70)
    student = student.detach()
    expected = rows_and_gradient(student.double(), teacher.double(), "logits_cosine", "reference")
    rows, gradient = rows_and_gradient(
        size * student, size * teacher, "logits_cosine", backend, temperature=2.0
    )
    torch.testing.assert_close(rows.double(), expected[0], rtol=2e-6, atol=0.0)
    torch.testing.assert_close(size * gradient.double(), expected[1], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mean_square_of_a_thousand_millions(backend):
    student, teacher = close_logits(3, 70)
    student, teacher = 1e9 * student.detach(), -1e9 * teacher
    rows, gradient = rows_and_gradient(student, teacher, "logits_mse", backend)
    gap = student.double() - teacher.double()
    torch.testing.assert_close(rows.double(), gap.square().mean(-1), rtol=1e-6, atol=0.0)
    torch.testing.assert_close(gradient.double(), gap / 35, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_of_zeros_has_a_right_angle_to_every_other(backend):
    some, zeros = torch.randn(1, 70, generator=torch.Generator().manual_seed(0)), torch.zeros(1, 70)
    student, teacher = torch.cat([zeros, some, zeros]), torch.cat([some, zeros, zeros])
    rows, gradient = rows_and_gradient(student, teacher, "logits_cosine", backend)
    torch.testing.assert_close(rows, torch.tensor([1.0, 1.0, 0.0]))
    assert gradient.abs().max() < 1e-7


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", OF_LOGITS)
def test_a_class_that_one_side_excludes_is_infinitely_far(divergence, backend):
    student, teacher = (z.detach().clone() for z in close_logits(3, 70))
    student[0, 3] = teacher[1, 3] = -INF
    student[2, 3] = teacher[2, 3] = -INF
    rows, _ = rows_and_gradient(student, teacher, divergence, backend)
    assert rows.isinf().tolist() == [True, True, False]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", OF_LOGITS)
@pytest.mark.parametrize("by", ["losses", "route"])
def test_several_teachers_that_have_logits(by, divergence, backend):
    inputs = linear_inputs(4, 90)
    other = torch.randn(4, 90, generator=torch.Generator().manual_seed(0))
    teachers = [TeacherHead(inputs.teacher_hidden, inputs.teacher_weight), TeacherLogits(other)]
    route = torch.tensor([0, 1, 1, 0])
    mixed = {"weights": [0.5, 2.0], "of": "losses"} if by == "losses" else {"route": route}
    heads, options = (inputs.student_hidden, inputs.student_weight), {"divergence": divergence}
    loss = linear_kd_loss(*heads, TeacherMixture(teachers, **mixed), backend=backend, **options)
    of_head = inputs.teacher_hidden @ inputs.teacher_weight.T
    parts = [
        linear_kd_loss(*heads, TeacherLogits(z), reduction="none", backend=backend, **options)
        for z in (of_head, other)
    ]
    weighted = torch.stack([0.5 * parts[0] + 2.0 * parts[1], torch.where(route == 0, *parts)])
    expected = weighted[0 if by == "losses" else 1].mean()
    torch.testing.assert_close(loss, expected)
    leaves = list(inputs.trainable().values())
    for one, two in zip(
        torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), strict=True
    ):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


def _without_logits() -> dict:
    log_p = torch.zeros(4, 90).log_softmax(-1)
    return {
        "log_probs": (TeacherLogProbs(log_p), "log_probs"),
        "probs": (TeacherProbs(log_p.exp()), "probs"),
        "topk": (TeacherTopK(torch.zeros(4, 1, dtype=torch.int64), log_p[:, :1]), "a TeacherTopK"),
        "mixture": (TeacherMixture([TeacherLogits(log_p)] * 2), "a mixture of probabilities"),
        "loss of a part": (
            TeacherMixture([TeacherLogits(log_p), TeacherLogProbs(log_p)], of="losses"),
            "log_probs",
        ),
    }


@pytest.mark.parametrize("divergence", OF_LOGITS)
@pytest.mark.parametrize("kind", _without_logits())
def test_teachers_without_logits_are_refused(kind, divergence):
    teacher, words = _without_logits()[kind]
    inputs = linear_inputs(4, 90)
    message = f"divergence: .*{words}.*logits are not known, got {divergence!r}"
    with pytest.raises(ValueError, match=message):
        linear_kd_loss(inputs.student_hidden, inputs.student_weight, teacher, divergence=divergence)
    if kind == "topk":
        with pytest.raises(ValueError, match=message):
            kd_loss(torch.zeros(4, 90), teacher, divergence=divergence)


def test_they_are_no_parts_of_a_sum():
    message = re.escape("got 'logits_mse', which is a function of the logits")
    with pytest.raises(ValueError, match=message):
        kd_loss(*close_logits(2, 5), divergence={"logits_mse": 1.0, "forward_kl": 1.0})

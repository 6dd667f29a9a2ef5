"""Weighted sums of several divergences, `divergence={name: weight}`, at every door."""

import dataclasses

import pytest
import torch

from modxfer_fast import LinearKDLoss, kd_loss, linear_kd_loss
from modxfer_fast.config.loss import LossSection
from modxfer_fast.engine import Objective
from modxfer_fast.kernels import dispatch
from modxfer_fast.kernels.common import KDSpec
from tests.inputs import BACKENDS, close_logits
from tests.support.kd_rows import check_row_kernels, close_rows

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    # NumPy, which interprets Triton, warns of infinities that the kernels mask
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]
SUM = {"forward_kl": 0.7, "jsd": 0.25, "total_variation": 2.0}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 1.5])
def test_row_kernels(backend, dtype, temperature):
    impl = dispatch.load("kd_loss", backend)
    spec = KDSpec(SUM, 0.3, temperature, 0.7, 0.4).checked()
    check_row_kernels(impl, close_rows(4, 1500, dtype), spec)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_sum_is_the_sum(reduction):
    student, teacher = close_logits(5, 60, torch.float64, delta=1.0)

    def loss(divergence, **options):
        return kd_loss(student, teacher, divergence=divergence, reduction=reduction, **options)

    expected = sum(
        weight * loss(name, beta=0.3 if name == "jsd" else None) for name, weight in SUM.items()
    )
    got = loss(SUM, beta=0.3)
    torch.testing.assert_close(got, expected)
    gradients = [torch.autograd.grad(of.sum(), student)[0] for of in (got, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_rows_have_neither_loss_nor_gradient(backend):
    student, _ = close_logits(3, 200)
    loss = kd_loss(student, student.detach(), divergence=SUM, temperature=0.7, backend=backend)
    assert loss == 0
    assert (torch.autograd.grad(loss, student)[0] == 0).all()


def test_heads_modules_and_options_take_them():
    torch.manual_seed(0)
    hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(50, 8)
    of_teacher = torch.randn(6, 5), torch.randn(50, 5)
    expected = sum(
        w * linear_kd_loss(hidden, weight, *of_teacher, divergence=name) for name, w in SUM.items()
    )
    got = linear_kd_loss(hidden, weight, *of_teacher, divergence=SUM)
    torch.testing.assert_close(got, expected)
    module = LinearKDLoss(divergence=SUM)
    torch.testing.assert_close(module(hidden, weight, *of_teacher), expected)
    assert module.options["divergence"] == SUM
    objective = Objective(SUM)
    assert objective.option == SUM
    assert dataclasses.replace(objective, divergence="jsd").checked() == KDSpec("jsd").checked()


def test_options_of_a_job():
    section = LossSection(divergence=SUM, beta=0.3)
    assert section.of_logits()["divergence"] == SUM
    for wrong, words in (
        ({"jds": 1.0}, "did you mean 'jsd'"),
        ({"jsd": -1.0}, "at least 0"),
        ({}, "positive"),
        ("jds", "did you mean 'jsd'"),
    ):
        with pytest.raises(ValueError, match=words):
            LossSection(divergence=wrong)

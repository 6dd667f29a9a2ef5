"""The biases of heads in the row kernels, which add them to the logits that they read."""

import pytest
import torch

from modxfer_fast.kernels import dispatch
from modxfer_fast.kernels.common import KDSpec
from tests.inputs import BACKENDS, DTYPES
from tests.support.kd_biases import BENDS, FUNCTIONS, check_biases
from tests.support.kd_rows import ONE_OF_A_KIND

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


@pytest.mark.parametrize("options", [{}, BENDS], ids=["straight", "bent"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("functions", FUNCTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_bits_of_logits_that_have_them(backend, functions, dtype, options):
    check_biases(dispatch.load("kd_loss", backend), functions, "jsd", dtype, **options)


@pytest.mark.parametrize("divergence", ONE_OF_A_KIND)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_way_to_sum_a_row(backend, divergence):
    check_biases(dispatch.load("kd_loss", backend), "rows", divergence)


def test_a_spec_without_biases_gives_kernels_none():
    spec, bias = KDSpec().checked(), torch.ones(4)[::2]
    assert spec.of_heads(None, None).biases == []
    student, teacher = spec.of_heads(bias.half(), None).biases
    assert student.dtype == torch.float32
    assert student.is_contiguous()
    assert teacher is None

"""Every C++ room against its fp64 truth with each instruction set that this processor has."""

import os
import subprocess
import sys

import pytest
import torch

from modxfer_fast import (
    TeacherLogits,
    kd_loss,
    linear_kd_loss,
    lora_projection_loss,
    teacher_topk,
)
from modxfer_fast.cli.main import main
from modxfer_fast.kernels.common import compiled, instruction_sets
from modxfer_fast.kernels.divergences import DIVERGENCES
from modxfer_fast.kernels.lora_linear import LoraTarget
from modxfer_fast.kernels.names import ROW_LOSSES
from modxfer_fast.kernels.projection_loss import projection_loss
from modxfer_fast.kernels.projection_loss.spec import ProjectionSpec
from modxfer_fast.transfer.moments import StreamingMoments
from tests.inputs import (
    Objective,
    check_linear,
    check_logits,
    close_logits,
    linear_inputs,
    row_weights,
)
from tests.lora_inputs import check as check_lora
from tests.lora_inputs import small_group
from tests.projection_inputs import check_projection, projection_inputs
from tests.support.topk_rows import assert_finds, hard_rows

SETS = instruction_sets.of_this_processor() if compiled.available()[0] else ()
pytestmark = [pytest.mark.usefixtures("poisoned_memory")]


@pytest.fixture(params=SETS)
def isa(request):
    """The kernels run with this set."""
    with instruction_sets.using(request.param):
        yield request.param


# sizes end in the middle of a vector of every width, and pass a block of sums of the widest


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_kd_loss(divergence, isa):
    student, teacher = close_logits(5, 1043)
    objective = Objective(divergence, 0.3, 2.0)
    loss = kd_loss(student, teacher, backend="cpp", **objective.options())
    (dlogits,) = torch.autograd.grad(loss, student)
    results = {"loss": loss.detach(), "dlogits": dlogits}
    check_logits(results, student, teacher, None, objective, row_weights(5, None, None))


def test_linear_kd_loss(isa):
    inputs = linear_inputs(9, 1043, labels=True)
    objective = Objective("jsd", 0.3, 2.0, 0.7, 0.4)
    tensors = inputs.tensors()
    leading = [tensors.pop(name) for name in list(tensors)[:4]]
    loss = linear_kd_loss(*leading, **tensors, backend="cpp", **objective.options())
    grads = torch.autograd.grad(loss, list(inputs.trainable().values()))
    results = {"loss": loss.detach(), **dict(zip(inputs.trainable(), grads, strict=True))}
    check_linear(results, inputs, objective, row_weights(9, inputs.labels, None))


def test_teacher_topk(isa):
    rows = hard_rows(1043)
    for k in (1, 40, 700):
        assert_finds(teacher_topk(TeacherLogits(rows), k=k, backend="cpp"), rows, k)


@pytest.mark.parametrize("kind", ["full", "low_rank"])
@pytest.mark.parametrize("loss", ROW_LOSSES)
def test_projection_loss(loss, kind, isa):
    inputs = projection_inputs(21, 70, 1043, kind=kind, bias=True, mask=True)
    beta = 0.3 if loss == "smooth_l1" else None
    spec = ProjectionSpec.checked(loss, beta, norm="layer", norm_eps=1e-5)
    tensors = inputs.tensors()
    value = projection_loss(
        tensors.pop("student_hidden"),
        tensors.pop("teacher_hidden"),
        tensors.pop("projection"),
        **tensors,
        loss=loss,
        beta=beta,
        norm=spec.norm,
        norm_eps=spec.norm_eps,
        backend="cpp",
    )
    leaves = inputs.trainable()
    grads = torch.autograd.grad(value, list(leaves.values()))
    results = {"loss": value.detach(), **dict(zip(leaves, grads, strict=True))}
    check_projection(results, inputs, spec)


def test_lora_linear(isa):
    check_lora(small_group(m=37), backend="cpp")


def test_lora_projection_loss_runs_as_its_two_ops(isa):
    """Its kernels are those of the rooms above; here that the sets do not mix."""
    generator = torch.Generator().manual_seed(0)
    randn = lambda *shape: torch.randn(shape, generator=generator)
    x, weight, a, b, teacher = randn(9, 70), randn(23, 70), randn(5, 70), randn(23, 5), randn(9, 23)
    hidden = x.double() @ (weight.double() + 0.5 * b.double() @ a.double()).T
    _, loss = lora_projection_loss(x, LoraTarget(weight, a, b, 0.5), teacher, None, backend="cpp")
    truth = (hidden - teacher.double()).square().mean()
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=0.0)


def test_correlation_has_the_same_bits_with_every_set(isa):
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(45, width, generator=generator) for width in (40, 69))

    def moments():
        stream = StreamingMoments([40], [69], [(0, 0)], backend="cpp")
        stream.update([x], [y])
        return stream.moments(0, 0)

    got = moments()
    truth = torch.cov(torch.cat([x, y], 1).double().T, correction=0)[:40, 40:]
    torch.testing.assert_close(got.cov_xy, truth, rtol=0.0, atol=1e-6)
    with instruction_sets.using("baseline"):
        baseline = moments()
    assert torch.equal(got.mean_x, baseline.mean_x)
    assert torch.equal(got.var_y, baseline.var_y)


def test_one_set_gives_the_same_bits_again_and_two_do_not(isa):
    student, teacher = close_logits(5, 1043)

    def dlogits():
        loss = kd_loss(student, teacher, divergence="jsd", backend="cpp")
        return torch.autograd.grad(loss, student)[0]

    assert torch.equal(dlogits(), dlogits())
    others = [name for name in SETS if name != isa]
    for other in others:
        first = dlogits()
        with instruction_sets.using(other):
            assert not torch.equal(dlogits(), first), f"{other} ran the kernels of {isa}"


# --- which one


def test_an_unknown_set_is_an_error_and_changes_nothing():
    before = instruction_sets.in_use()
    with pytest.raises(ValueError, match=r"name: expected .* one of baseline.*, got 'sse9'"):
        instruction_sets.use("sse9")
    with pytest.raises(RuntimeError, match="index: expected"):
        torch.ops.modxfer_csrc.use_instruction_set(len(instruction_sets.NAMES))
    assert instruction_sets.in_use() == before


def test_the_variable_is_read_when_the_kernels_are_loaded():
    code = (
        "from modxfer_fast.kernels.common import compiled, instruction_sets;"
        "compiled.available(); print(instruction_sets.in_use())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "MODXFER_CPU_ISA": "baseline"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "baseline"


def test_a_set_that_this_processor_has_not_is_told_to_the_user(monkeypatch, capsys):
    compiled.available.cache_clear()
    monkeypatch.setenv("MODXFER_CPU_ISA", "avx512")
    monkeypatch.setattr(instruction_sets, "of_this_processor", lambda: ("baseline", "avx2"))
    try:
        assert main(["doctor"]) == 2
    finally:
        compiled.available.cache_clear()
    error = capsys.readouterr().err
    assert "MODXFER_CPU_ISA: expected an instruction set of this processor" in error
    assert "one of baseline, avx2, got 'avx512'" in error

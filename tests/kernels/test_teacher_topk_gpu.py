"""teacher_topk on a GPU, by torch.topk: against fp64, and that nothing waits."""

import pytest
import torch

from modxfer_fast import TeacherLogits, teacher_topk
from tests.gpu import backend_on, no_waiting
from tests.inputs import DTYPES
from tests.support.topk_rows import (
    assert_finds,
    assert_finds_large,
    assert_is_broken,
    broken_rows,
    fields,
    hard_rows,
    randn,
)

pytestmark = pytest.mark.first
SIZES = {"cpu": (50, 2001, 24), "cuda": (1000, 32003, 512)}


@pytest.mark.parametrize("dtype", DTYPES)
def test_of_a_head_without_a_wait(dtype, device):
    rows, classes, width = SIZES[device]
    hidden = randn(rows, width).to(device, dtype)
    weight = (3.0 / width**0.5 * randn(classes, width, seed=1)).to(device, dtype)
    backend = backend_on(device, "kd_loss")
    teacher_topk(hidden, weight, k=64, workspace_mb=64, backend=backend)
    with no_waiting(device):
        found = teacher_topk(hidden, weight, k=64, workspace_mb=64, backend=backend)
    log_p = (hidden.double() @ weight.double().t()).log_softmax(-1)
    ids, log_probs, log_tail = fields(found)
    torch.testing.assert_close(log_probs.double(), log_p.topk(64).values, rtol=0, atol=2e-5)
    torch.testing.assert_close(log_probs.double(), log_p.gather(1, ids.long()), rtol=0, atol=2e-5)
    tail = log_p.scatter(1, ids.long(), -torch.inf).logsumexp(-1)
    torch.testing.assert_close(log_tail.double(), tail, rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_of_logits(dtype, device):
    rows, classes, _ = SIZES[device]
    logits = (3.0 * randn(rows, classes)).to(device, dtype)
    found = teacher_topk(TeacherLogits(logits), k=64, backend=backend_on(device, "kd_loss"))
    assert_finds_large(found, logits, 64)


def test_hard_rows_and_broken_ones(device):
    for make, check in ((hard_rows, assert_finds), (broken_rows, assert_is_broken)):
        rows = make(1043)
        teacher = TeacherLogits(rows.to(device))
        found = fields(teacher_topk(teacher, k=40, backend=backend_on(device, "kd_loss")))
        found = tuple(field.cpu() for field in found)
        check(found, rows, 40) if make is hard_rows else check(found, 40)

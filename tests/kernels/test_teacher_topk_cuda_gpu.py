"""The rows of csrc/cuda that find a teacher's K largest logits on a GPU: fp64, and equal bits."""

import pytest
import torch

from modxfer_fast.kernels import dispatch
from modxfer_fast.kernels.common import KDSpec
from tests.gpu import NEEDS_GPU
from tests.support.topk_rows import (
    assert_finds,
    assert_finds_large,
    assert_is_broken,
    broken_rows,
    hard_rows,
)

pytestmark = [*NEEDS_GPU, pytest.mark.first]
# clusters of 1, 2, 4 and 8 blocks in fp32, and rows that none holds
CLASSES = (301, 8192, 16384, 32000, 128256, 400001)


@pytest.fixture(scope="module")
def rows_of_cuda():
    ok, reason = dispatch.availability("kd_loss", "cuda")
    if not ok:
        pytest.skip(reason)
    return dispatch.load("kd_loss", "cuda")


@pytest.mark.parametrize(
    ("dtype", "k"),
    [
        (torch.float32, 1),
        (torch.float32, 1000),
        *((dtype, 64) for dtype in (torch.float32, torch.bfloat16, torch.float16)),
    ],
    ids=str,
)
@pytest.mark.parametrize("classes", CLASSES)
def test_twenty_runs_of_each_cluster_have_the_same_bits(classes, dtype, k, rows_of_cuda):
    k = min(k, classes)
    generator = torch.Generator("cuda").manual_seed(classes)
    logits = 3.0 * torch.randn(300, classes, generator=generator, device="cuda")
    logits = logits.to(dtype)
    spec = KDSpec().checked()
    found = rows_of_cuda.teacher_topk(logits, k, spec)
    assert_finds_large(found, logits, k)
    for _ in range(20):
        again = rows_of_cuda.teacher_topk(logits, k, spec)
        assert all(map(torch.equal, found, again))


@pytest.mark.parametrize("classes", [67, 4099], ids=lambda classes: f"fp32-V{classes}")
def test_every_kind_of_row(classes, rows_of_cuda):
    for options in ({}, {"teacher_softcap": 4.0, "temperature": 2.0}):
        spec, k = KDSpec(**options).checked(), 40
        hard, broken = hard_rows(classes), broken_rows(classes)
        rows = torch.cat([hard, broken, hard]).cuda()
        found = tuple(field.cpu() for field in rows_of_cuda.teacher_topk(rows, k, spec))
        bend = (1.0, spec.teacher_softcap, spec.temperature)
        assert_finds(tuple(field[:11] for field in found), hard, k, *bend)
        assert_is_broken(tuple(field[11:15] for field in found), k)
        assert_finds(tuple(field[15:] for field in found), hard, k, *bend)

"""The CUDA rows that find a teacher's K largest logits on the emulator, against fp64."""

import pytest
import torch

from modxfer_fast.kernels.common import KDSpec
from tests.emulated.kd_loss import Emulated
from tests.support.topk_rows import assert_finds, assert_is_broken, broken_rows, hard_rows, randn

SEEDS = range(4)
HELD = pytest.mark.parametrize("is_resident", [True, False], ids=["resident", "streamed"])
PLAIN = KDSpec().checked()


def blocks(is_resident: bool, **options) -> Emulated:
    return Emulated(2 if is_resident else 1, is_resident=is_resident, **options)


@pytest.mark.parametrize("cluster", [1, 2, 8])
# more than there are threads, which have no bound then; all of them
@pytest.mark.parametrize(("classes", "k"), [(2, 1), (67, 67), (701, 9), (701, 600), (4099, 90)])
def test_any_width_and_cluster(classes, k, cluster):
    rows = hard_rows(classes)
    assert_finds(Emulated(cluster).teacher_topk(rows, k, PLAIN), rows, k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@HELD
def test_bent_logits_of_each_dtype_in_rows_of_any_alignment(is_resident, dtype):
    options = {"teacher_logit_scale": 0.5, "teacher_softcap": 4.0, "temperature": 2.0}
    spec = KDSpec(**options).checked()
    wide = torch.full((5, 1003), float("nan"), dtype=dtype)
    for first in (0, 3):
        rows = wide[:, first : first + 712]
        rows.copy_(3.0 * randn(5, 712))
        found = blocks(is_resident).teacher_topk(rows, 50, spec)
        assert_finds(found, rows, 50, 0.5, 4.0, 2.0)


@HELD
def test_hard_rows_and_rows_without_a_softmax_among_others(is_resident):
    hard, broken, k = hard_rows(300), broken_rows(300), 7
    mixed = torch.empty(15, 300)
    is_broken = torch.arange(15) % 4 == 1
    mixed[is_broken], mixed[~is_broken] = broken, hard
    found = blocks(is_resident).teacher_topk(mixed, k, PLAIN)
    assert_finds(tuple(field[~is_broken] for field in found), hard, k)
    assert_is_broken(tuple(field[is_broken] for field in found), k)


@pytest.mark.parametrize("cluster", [1, 4])
@HELD
def test_no_race_and_the_same_bits_with_every_schedule(is_resident, cluster):
    rows = hard_rows(700)[[0, 3, 6, 9]]
    rows[1, 600:] = torch.nan
    found = [
        Emulated(cluster, 64, 2, is_resident, seed, checked=True).teacher_topk(rows, 40, PLAIN)
        for seed in SEEDS
    ]
    for other in found[1:]:
        for got, want in zip(other, found[0], strict=True):
            assert torch.equal(got.nan_to_num(), want.nan_to_num())

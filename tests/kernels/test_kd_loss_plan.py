"""How many blocks share a row on a GPU: csrc/cuda/kd_loss_plan.h."""

from ctypes import c_int

import pytest

from tests.emulated import library

H200, SHARED = 132, 227 * 1024


def plan(rows: int, classes: int, logit_bytes: int, most_shared: int = SHARED) -> list[int]:
    found = (c_int * 5)()
    kernels = library("emulated_kd_loss.cpp", checked=False)
    kernels.planned_kd_loss(rows, classes, logit_bytes, H200, most_shared, found)
    return list(found)


@pytest.mark.parametrize("logit_bytes", [2, 4])
@pytest.mark.parametrize("rows", [1, 7, 8192])
def test_every_plan_fits(rows, logit_bytes):
    for classes in (1, 255, 32000, 50257, 128256, 151936, 256000, 500000, 2**24):
        for most_shared in (0, 48 * 1024, SHARED):
            is_resident, cluster, blocks, threads, used = plan(
                rows, classes, logit_bytes, most_shared
            )
            assert cluster in (1, 2, 4, 8)
            assert 0 < blocks <= rows * cluster
            assert blocks % cluster == 0
            assert threads % 32 == 0
            assert used <= (most_shared if is_resident else 48 * 1024)
            assert cluster == 1 or is_resident


@pytest.mark.parametrize(
    ("classes", "logit_bytes", "cluster"),
    [(4096, 4, 1), (32000, 4, 4), (32000, 2, 2), (128256, 4, 8), (151936, 2, 8)],
)
def test_the_cluster_grows_with_the_row(classes, logit_bytes, cluster):
    is_resident, found, blocks, _, _ = plan(8192, classes, logit_bytes)
    assert is_resident
    assert found == cluster
    assert blocks >= H200 // cluster * cluster  # every multiprocessor has one


def test_as_many_blocks_fit_a_multiprocessor_as_are_launched_for_it():
    for classes in range(1000, 500000, 50):
        is_resident, _, _, threads, used = plan(8192, classes, 4)
        at_once = {512: 1, 384: 2, 256: 3}[threads]
        # of the 228 KiB of a multiprocessor, each block takes 1 KiB more than it has
        assert not is_resident or at_once * (used + 1024) <= 228 * 1024, classes


def test_a_row_that_no_cluster_holds_is_streamed():
    is_resident, cluster, *_ = plan(8192, 2**20, 4)
    assert not is_resident
    assert cluster == 1

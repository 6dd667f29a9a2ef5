"""How many blocks share a row on a GPU, and how many there are: csrc/cuda/kd_loss_plan.h."""

import json
from ctypes import CFUNCTYPE, c_int
from pathlib import Path

import pytest

from tests.emulated import library

SHARED = 227 * 1024
H200 = (18, 18, 16, 16, 16, 16, 16, 16)  # multiprocessors of the parts that a cluster lies in
BUDGET = Path(__file__).parents[1] / "csrc" / "nvcc_budget.json"
AtOnce = CFUNCTYPE(c_int, c_int, c_int, c_int)


def at_once(registers: int, parts: tuple[int, ...] = H200) -> AtOnce:
    """Clusters that such a device runs at once, as its data sheet has the limits."""

    def clusters(cluster: int, threads: int, used: int) -> int:
        allocated = -(-registers // 8) * 8 * threads
        blocks = min(65536 // allocated, 228 * 1024 // (used + 1024), 2048 // threads)
        return sum(part * blocks // cluster for part in parts)

    return AtOnce(clusters)


def plan(
    rows: int,
    classes: int,
    logit_bytes: int,
    most_shared: int = SHARED,
    registers: int = 64,
    clusters: AtOnce | None = None,
) -> list[int]:
    found = (c_int * 5)()
    kernels = library("emulated_kd_loss.cpp", checked=False)
    kernels.planned_kd_loss(
        *(rows, classes, logit_bytes, most_shared, registers),
        *(clusters or at_once(registers), found),
    )
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
    assert blocks >= sum(H200) * 15 // 16  # nearly every multiprocessor has one


def test_no_block_waits_for_another_to_end():
    """98 clusters of four run at once where 99 have the shared memory."""
    _, cluster, blocks, _, _ = plan(8192, 32000, 4)
    assert cluster == 4
    assert blocks == 4 * 98
    for classes in (1000, 4096, 32000, 50257, 128256, 151936, 2**20):
        for registers in range(32, 256, 8):
            clusters = at_once(registers)
            found = plan(8192, classes, 4, registers=registers, clusters=clusters)
            _, cluster, blocks, threads, used = found
            assert 0 < blocks <= cluster * clusters(cluster, threads, used)


def test_registers_of_every_kernel_allow_its_blocks():
    """Whatever nvcc used of them, a multiprocessor loads a row beside the sums of another."""
    table = json.loads(BUDGET.read_text())
    rows = ("kd_loss_rows", "teacher_topk_rows", "cross_entropy_rows")
    used = {
        kernel["registers"]
        for target in ("sm_90a", "sm_100a")
        for name, kernel in table[target].items()
        if any(row in name for row in rows)
    }
    assert max(used) > 80  # of which 768 threads are too many
    for registers in used:
        _, cluster, blocks, threads, _ = plan(8192, 4096, 4, registers=registers)
        at_once, rest = divmod(blocks, sum(H200))
        assert (cluster, rest) == (1, 0)
        assert at_once >= (3 if registers <= 80 else 2)
        assert at_once * threads * registers <= 65536
        assert at_once * threads >= 512


def test_a_row_that_no_cluster_holds_is_streamed():
    is_resident, cluster, *_ = plan(8192, 2**20, 4)
    assert not is_resident
    assert cluster == 1


def test_a_device_that_runs_no_cluster_reads_rows_again():
    """Such as a slice of one whose parts are small."""
    alone = AtOnce(lambda cluster, threads, used: 14 if cluster == 1 else 0)
    is_resident, cluster, blocks, _, _ = plan(8192, 128256, 4, clusters=alone)
    assert not is_resident
    assert (cluster, blocks) == (1, 14)


def test_what_is_known_is_asked_for_once():
    """By threads together; an error is not kept, so that each key is asked for twice here."""
    kernels = library("known.cpp", checked=False)
    assert kernels.asked_by_threads(8, 50) == 2 * 50

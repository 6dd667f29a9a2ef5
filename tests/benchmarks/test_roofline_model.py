"""What is predicted of linear_kd_loss against what its loop does, on a GPU that is only claimed."""

from types import SimpleNamespace

import pytest
import torch

from benchmarks import roofline
from benchmarks.kd import Shape
from modxfer_fast.kernels.common import KDSpec
from modxfer_fast.kernels.common.rows import Rows
from modxfer_fast.kernels.linear_kd_loss.stream import stream
from modxfer_fast.measure.claimed import Launches, OnGPU
from modxfer_fast.measure.roofline import Roof, Work

BF16 = torch.bfloat16
KINDS = {"fill": "zeros_like", "copy": "copy_", "round": "_to_copy"}
PRODUCTS = ("z_s", "z_t", "dhidden", "dweight")


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "shape",
    [Shape(20, 8, 16, 4096), Shape(100, 32, 16, 4096), Shape(300, 24, 16, 4001)],
    ids=["one chunk", "one slab", "many chunks"],
)
def test_launches_are_those_of_the_loop(shape, dtype, frozen):
    rows_of_kernels = []

    def fwd_bwd(student, teacher, labels, weights, spec, dlogits):
        rows_of_kernels.append(len(student))
        return torch.empty_like(weights), torch.empty_like(weights)

    plan = roofline.plan(shape, dtype, "cuda", frozen=frozen, workspace_mb=1)
    with Launches() as launches:
        stream(
            SimpleNamespace(kd_loss_fwd_bwd=fwd_bwd),
            *roofline.heads(shape, dtype, "cuda"),
            Rows(None, OnGPU.make(shape.N), -100, None),
            KDSpec("forward_kl").checked(),
            wanted=roofline.wanted(frozen),
            workspace_bytes=2**20,
        )
    steps = list(roofline.steps(shape, dtype, "cuda", "forward_kl", plan, frozen=frozen))
    names = [step.name for step in steps]
    assert names.count("rows") == len(rows_of_kernels)
    assert plan.rows == max(rows_of_kernels)
    products = launches.names.pop("mm", 0) + launches.names.pop("addmm", 0)
    products += launches.names.pop("addmm_", 0)
    assert sum(name in PRODUCTS for name in names) == products
    for name, operator in KINDS.items():
        assert names.count(name) == launches.names.pop(operator, 0), name
    assert not launches.names, "the loop launches what is not predicted"


def test_flops_are_those_of_the_formula_whatever_the_plan():
    shape = Shape(8192, 2048, 4096, 128256)
    for frozen in (False, True):
        for options in ({}, {"workspace_mb": 64}, {"slabs": False}):
            plan = roofline.plan(shape, BF16, "cuda", frozen=frozen, **options)
            steps = roofline.steps(shape, BF16, "cuda", "jsd", plan, frozen=frozen)
            products = (2 if frozen else 3) * shape.D_s + shape.D_t
            assert sum(step.work.flops for step in steps) == 2 * shape.N * shape.V * products


def test_slabs_and_larger_chunks_move_fewer_bytes():
    for shape, options in roofline.GATES.values():
        before = roofline.predict(shape, "H200", **options, workspace_mb=512, slabs=False)
        now = roofline.predict(shape, "H200", **options)
        assert now.gigabytes < before.gigabytes
        assert now.launches < before.launches
        assert now.floor_ms < now.ms <= 1.001 * before.ms


def test_steps_run_one_after_another():
    roof = Roof(bytes_per_s=10.0, flops_per_s=100.0)
    assert roof.predicted_ms(Work(100, 20), Work(100, 1)) == 3000.0
    assert roof.predicted_ms(Work(0, 0)) == 0.0


def test_the_documented_table_is_what_is_predicted():
    page = (roofline.DOCS / "linear_kd_loss.md").read_text()
    assert roofline.table() in page, "python -m benchmarks.roofline"

"""The Triton kernels compile for every supported GPU, and no thread spills registers to memory.

`tests/aot_budget.json` has what they need; a kernel that changed fails until `make aot-budget` has
compiled it and written down what it needs now. Under another Triton all are compiled here.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed")

AOT = Path(__file__).parents[1] / "aot.py"
BUDGET = json.loads(AOT.with_name("aot_budget.json").read_text())
IS_OF_THIS_TRITON = BUDGET["triton"] == triton.__version__
TARGETS = ["cuda:80", "cuda:90", "cuda:100", "hip:gfx942"]
FUNCTIONS = {
    "kd_loss_fwd",
    "kd_loss_bwd",
    "kd_loss_fwd_bwd",
    "kd_loss_stats",
    "kd_loss_sums",
    "kd_loss_write",
    "topk_kd_loss_fwd",
    "topk_kd_loss_fwd_bwd",
    "cross_entropy_fwd",
    "cross_entropy_fwd_bwd",
    "projection_loss_rows",
    "shrink",
    "expand",
    "ds_db",
    "dx",
    "da",
    "reduce",
    "centre",
    "scale",
}


@pytest.fixture(scope="module")
def kernels():
    # the interpreter of the other tests replaces what is compiled here, so this is another process
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, str(AOT), "--known" if IS_OF_THIS_TRITON else "--core", "--json"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    found = [json.loads(line) for line in run.stdout.splitlines()]
    assert run.returncode in (0, 1), run.stderr  # 1: there are spills
    assert found, run.stderr
    return found


@pytest.mark.parametrize("target", TARGETS)
def test_compiles_without_spills(kernels, target):
    of_target = [kernel for kernel in kernels if kernel["target"] == target]
    assert {kernel["function"] for kernel in of_target} == FUNCTIONS
    of_target = [kernel for kernel in of_target if "spills" in kernel]  # else it changed, see below
    assert not [kernel for kernel in of_target if kernel["spills"]]
    if target.startswith("cuda"):
        assert not [k for k in of_target if k["registers"] > k["most_registers"]]


@pytest.mark.skipif(
    not IS_OF_THIS_TRITON,
    reason=f"the budget is of Triton {BUDGET['triton']}, this is {triton.__version__}",
)
def test_the_budget_is_that_of_the_kernels(kernels):
    names = {target: set() for target in TARGETS}
    for kernel in kernels:
        names[kernel["target"]].add(kernel["name"])
    gone = {target: BUDGET[target].keys() - names[target] for target in TARGETS}
    changed = [f"{kernel['target']} {kernel['name']}" for kernel in kernels if not kernel["known"]]
    message = "tests/aot_budget.json is stale: run `make aot-budget`, look at the changes, commit"
    assert not changed, "\n".join([message, *changed])
    assert not any(gone.values()), f"{message}; no case is called {gone}"

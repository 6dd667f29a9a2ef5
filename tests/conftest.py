"""How the tests run: one thread a process, Triton's interpreter where there is no GPU, costs shown.

Whole files go to the processes of pytest-xdist, the dear ones first. Files whose tests run on ranks
go to one process, one after the other: they share the ranks, and ranks fill the cores.

The interpreter pays for every program of a kernel. Of a product of parameters it therefore gets the
cases in which any two values meet (`pairs.py`): those with backend "triton", and all of a file
marked `interpreted`. Native backends run the whole product, and so does a GPU.
"""

import os
from collections import defaultdict

# before torch starts its threads; tests this small only wait for a second one
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

from tests.pairs import pairwise

torch.set_num_threads(1)
if not torch.cuda.is_available():
    # chosen before Triton is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

pytest_plugins = ["tests.cpu_seconds"]
RANKS = "_distributed.py"  # how the names of files end whose tests run on ranks
DEAR = (RANKS, "/cli/", "/engine/", "/kernels/")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    _thin(config, items)

    def place(item: pytest.Item) -> int:
        path = item.path.as_posix()
        return next((i for i, name in enumerate(DEAR) if name in path), len(DEAR))

    items.sort(key=place)  # stable: within a file the order stays


def _thin(config: pytest.Config, items: list[pytest.Item]) -> None:
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    functions = defaultdict(list)
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        if params.get("backend") == "triton" or (params and item.get_closest_marker("interpreted")):
            functions[item.nodeid.split("[")[0]].append(item)
    left_out = set()
    for cases in functions.values():
        kept = pairwise([{k: repr(v) for k, v in item.callspec.params.items()} for item in cases])
        left_out |= set(cases).difference(cases[i] for i in kept)
    if left_out:
        config.hook.pytest_deselected(items=[item for item in items if item in left_out])
        items[:] = [item for item in items if item not in left_out]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log):
    if config.getvalue("dist") == "worksteal":  # many processes share a GPU, test by test
        return None
    from xdist.scheduler import LoadFileScheduling

    class WholeFiles(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "ranks" if file.endswith(RANKS) else file

    config.option.loadscopereorder = False  # it would go by the number of tests
    return WholeFiles(config, log)

"""How the tests run: one thread a process, Triton's interpreter where there is no GPU, costs shown.

Whole files go to the processes of pytest-xdist, the dear ones first. Tests on ranks, which have
`distributed` in the name of their file or their own, go to one process, one after the other: they
share the ranks, and ranks fill the cores.

The interpreter pays for every program of a kernel. Of a product of parameters it therefore gets the
cases in which any two values meet (`pairs.py`). Native backends run the whole product, and so does
a GPU. The marker `pairs` asks for the same where a test is dear for another reason.
"""

import gc
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

pytest_plugins = ["tests.cpu_seconds", "tests.fixtures"]
ON_RANKS = "distributed"
DEAR = (ON_RANKS, "/cli/", "/engine/", "/kernels/")


@pytest.fixture(scope="session")
def ranks():
    """Two ranks that all suites of one process share; started when first used."""
    from modxfer_fast.testing import Ranks

    with Ranks() as ranks:
        yield ranks


@pytest.fixture(scope="session")
def four_ranks():
    """As `ranks`, four of them."""
    from modxfer_fast.testing import Ranks

    with Ranks(4) as ranks:
        yield ranks


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    gc.freeze()  # what was imported, half a second for each collection of garbage that looks at it


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    _thin(config, items)

    def place(item: pytest.Item) -> int:
        return next((i for i, name in enumerate(DEAR) if name in item.nodeid), len(DEAR))

    items.sort(key=place)  # stable: within a file the order stays


def _thin(config: pytest.Config, items: list[pytest.Item]) -> None:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    functions = defaultdict(list)
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        dear = interpreted and params.get("backend") == "triton"
        if params and (dear or item.get_closest_marker("pairs")):
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
            return ON_RANKS if ON_RANKS in nodeid else super()._split_scope(nodeid)

    config.option.loadscopereorder = False  # it would go by the number of tests
    return WholeFiles(config, log)

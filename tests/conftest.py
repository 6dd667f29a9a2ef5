"""How the tests run: one thread a process, Triton's interpreter where there is no GPU, costs shown.

Whole files go to the processes of pytest-xdist, the dear ones first. Files whose tests run on ranks
go to one process, one after the other: they share the ranks, and ranks fill the cores.
"""

import os

# before torch starts its threads; tests this small only wait for a second one
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    # chosen before Triton is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

pytest_plugins = ["tests.cpu_seconds"]
RANKS = "_distributed.py"  # how the names of files end whose tests run on ranks
DEAR = (RANKS, "/cli/", "/engine/", "/kernels/")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        path = item.path.as_posix()
        return next((i for i, name in enumerate(DEAR) if name in path), len(DEAR))

    items.sort(key=place)  # stable: within a file the order stays


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log):
    from xdist.scheduler import LoadFileScheduling

    class WholeFiles(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "ranks" if file.endswith(RANKS) else file

    config.option.loadscopereorder = False  # it would go by the number of tests
    return WholeFiles(config, log)

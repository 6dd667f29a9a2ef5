"""Where the benchmarks are: in the repository, not in the wheel."""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import modxfer_fast
from modxfer_fast.errors import UserError
from modxfer_fast.kernels import env
from modxfer_fast.measure import environment


def load_benchmarks() -> Callable[[str], ModuleType]:
    """Importer of `benchmarks.<name>`.

    The package is loaded from its folder: with the repository root on sys.path, our `kernels/`
    would answer to the name of another library.

    Raises:
        UserError: neither the package nor the current folder is part of a checkout.
    """
    for root in (Path(modxfer_fast.__file__).resolve().parents[1], Path.cwd()):
        folder = root / "benchmarks"
        if "benchmarks" not in sys.modules and (folder / "harness.py").is_file():
            spec = importlib.util.spec_from_file_location(
                "benchmarks", folder / "__init__.py", submodule_search_locations=[str(folder)]
            )
            assert spec is not None  # of a file that is there
            assert spec.loader is not None
            sys.modules["benchmarks"] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules["benchmarks"])
    if "benchmarks" not in sys.modules:
        raise UserError(
            "bench: the benchmarks are not part of the installed package; "
            "run `modxfer bench` in a checkout of the repository"
        )
    return lambda name: importlib.import_module(f"benchmarks.{name}")


def load_room(name: str) -> ModuleType:
    """The module `benchmarks/bench_<name>.py`.

    Libraries are held to the instruction set of our kernels before they compute anything.

    Raises:
        UserError: there is none.
    """
    environment.hold_libraries(env.cpu_isa())
    benchmarks = load_benchmarks()
    known = benchmarks("rooms").names()
    if name not in known:
        raise UserError(f"room: expected one of {', '.join(known)}, got {name!r}")
    return benchmarks(f"bench_{name}")

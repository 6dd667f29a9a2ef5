"""The walls of the project: who imports whom, which files a room has, what an import costs."""

import ast
import importlib.util
import json
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import modxfer_fast
from modxfer_fast.kernels import dispatch
from modxfer_fast.kernels.names import BACKENDS

ROOT = Path(__file__).parents[1]
PACKAGE = "modxfer_fast"
# Data flows one way; a package imports from those left of it. `kernels` and `losses` are on a
# branch of their own, and stand where they are first needed: by the models, and by the engine.
ORDER = (
    *("errors", "files", "config", "data", "kernels", "measure"),
    *(
        "models",
        "transfer",
        "losses",
        "teacher_cache",
        "serving",
        "engine",
        "compat",
        "report",
        "jobs",
    ),
)
# What configuration may read of the kernels: modules that import no torch.
OF_KERNELS = (f"{PACKAGE}.kernels.divergences", f"{PACKAGE}.kernels.names")
ONTO = ("cli", "testing", "__main__")  # may import all of them, and are imported by none
FILE_OF_BACKEND = {"reference": "reference.py"}


def modules() -> Iterator[tuple[str, Path]]:
    """Import name and file of every module of the package."""
    for folder, name in (
        (ROOT / "modxfer_fast", PACKAGE),
        (ROOT / "kernels", f"{PACKAGE}.kernels"),
    ):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            if parts[-1] == "__init__":
                parts = parts[:-1]
            yield ".".join((name, *parts)), path


def imports(name: str, path: Path) -> set[str]:
    """Absolute names of the modules a file imports, `from x import y` as x.y."""
    tree = ast.parse(path.read_text())
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = importlib.util.resolve_name("." * node.level + base, package)
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def layer(name: str) -> str | None:
    """The part of the package a module belongs to; None outside the package."""
    parts = name.split(".")
    if parts[0] != PACKAGE:
        return None
    if name.removeprefix(f"{PACKAGE}.") in modxfer_fast.__all__:  # public: where it is defined
        public = getattr(modxfer_fast, parts[1])
        return layer(f"{public.__module__}.{parts[1]}") if hasattr(public, "__module__") else ""
    return parts[1] if len(parts) > 1 else ""


def test_modules_are_found():
    names = dict(modules())
    assert f"{PACKAGE}.kernels.kd_loss.op" in names
    assert f"{PACKAGE}.engine.trainer" in names
    assert layer(f"{PACKAGE}.kernels.dispatch") == "kernels"


def test_every_layer_has_its_place():
    layers = {layer(name) for name, _ in modules()} - {"", "_version"}
    assert layers <= {*ORDER, *ONTO}


def test_imports_go_one_way():
    backwards = []
    for name, path in modules():
        here = layer(name)
        if here in ("", "_version", *ONTO):
            continue
        allowed = {*ORDER[: ORDER.index(here) + 1], "_version", ""}
        for imported in imports(name, path):
            there = layer(imported)
            if here == "config" and imported.startswith(OF_KERNELS):
                continue
            if there is not None and there not in allowed:
                backwards.append(f"{name} imports {imported}")
    assert not backwards


@pytest.mark.parametrize("name", OF_KERNELS)
def test_what_configuration_reads_of_the_kernels_needs_no_torch(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # its import raises
    runpy.run_path(str(dict(modules())[name]))


def test_kernels_import_nothing_of_ours_but_their_own_package():
    foreign = {
        f"{name} imports {imported}"
        for name, path in modules()
        for imported in imports(name, path)
        if layer(name) == "kernels" and layer(imported) not in (None, "kernels")
    }
    assert not foreign


def test_kernels_and_measure_need_torch_and_triton_only():
    allowed = {"torch", "triton", PACKAGE, *sys.stdlib_module_names}
    for name, path in modules():
        if layer(name) in ("kernels", "losses", "measure"):
            needed = {imported.split(".")[0] for imported in imports(name, path)}
            assert needed <= allowed, f"{name} imports {needed - allowed}"


def test_only_triton_implementations_import_triton():
    for name, path in modules():
        tops = {imported.split(".")[0] for imported in imports(name, path)}
        assert "triton" not in tops or path.name.startswith("triton_"), name


def test_the_command_line_only_parses():
    lines = [line for n, path in modules() if layer(n) == "cli" for line in path.open()]
    assert len(lines) < 500


def test_report_sees_no_tensors():
    for name, path in modules():
        if layer(name) == "report":
            tops = {imported.split(".")[0] for imported in imports(name, path)}
            assert "torch" not in tops, name


def test_backends_of_a_room_do_not_import_one_another():
    backends = {f"{name}_impl" for name in BACKENDS}
    for name, path in modules():
        parts = name.split(".")
        if layer(name) != "kernels" or parts[-1] not in backends:
            continue
        room, backend = parts[2], parts[-1]
        for imported in imports(name, path):
            # a room may build on another room's implementation for the same backend
            others = backends & set(imported.split("."))
            assert others <= {backend}, f"{name} imports {imported}"
            assert not imported.startswith(f"{PACKAGE}.kernels.{room}.{backend}")


def test_files_of_kernels_can_be_read_at_one_sitting():
    files = [path for name, path in modules() if layer(name) == "kernels"]
    files += [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    assert not [path.name for path in files if len(path.read_text().splitlines()) > 600]


# --- rooms


@pytest.mark.parametrize("room", dispatch.ROOMS)
def test_room_is_complete(room):
    folder = ROOT / "kernels" / room
    tests = ROOT / "tests" / "kernels"
    wanted = [folder / "op.py", tests / f"test_{room}.py", tests / f"test_{room}_gpu.py"]
    wanted.append(ROOT / "benchmarks" / f"bench_{room}.py")
    for backend in BACKENDS:
        wanted.append(folder / FILE_OF_BACKEND.get(backend, f"{backend}_impl.py"))
    for backend, source in (("cpp", f"cpu/{room}.cpp"), ("cuda", f"cuda/{room}.cu")):
        path = folder / f"{backend}_impl.py"
        if path.exists() and "compiled.ops()" in path.read_text():
            wanted.append(ROOT / "csrc" / source)
    missing = [str(path.relative_to(ROOT)) for path in wanted if not path.exists()]
    assert not missing


@pytest.mark.parametrize("room", dispatch.ROOMS)
def test_room_offers_every_backend_its_interface(room):
    for backend in BACKENDS:
        ok, reason = dispatch.availability(room, backend)
        if not ok:
            assert reason
            continue
        impl = dispatch.load(room, backend)
        assert callable(impl.supports)
        for function in dispatch.ROOMS[room]:
            assert callable(getattr(impl, function))


def test_kernels_of_a_gpu_are_complete_where_there_is_none():
    for room, functions in dispatch.ROOMS.items():
        impl = dispatch.load(room, "cuda")
        assert not [name for name in functions if not callable(getattr(impl, name, None))]


def test_every_folder_of_kernels_is_a_room():
    folders = {path.parent.name for path in (ROOT / "kernels").glob("*/__init__.py")}
    assert folders - {"common"} == set(dispatch.ROOMS)


def test_every_room_is_in_its_own_tests_and_in_the_readme():
    readme = (ROOT / "README.md").read_text()
    for room in dispatch.ROOMS:
        assert f"`{room}`" in readme


# --- what an import costs


def python(code: str, folder: Path) -> dict:
    """Runs `code` in a fresh interpreter; what it put into `result`."""
    script = f"import json, sys\nresult = {{}}\n{code}\nprint(json.dumps(result))"
    run = subprocess.run(
        [sys.executable, "-c", script],
        env={"PATH": ""},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


IMPORT = """
import importlib.util, types
import torch
def refuse(*args, **kwargs): raise SystemExit('the import asked for a GPU')
for name in ('is_available', 'device_count', 'current_device', 'init', '_lazy_init',
             'get_device_capability', 'get_device_properties', 'is_initialized'):
    setattr(torch.cuda, name, refuse)
before = set(sys.modules)
import modxfer_fast
result['loaded'] = sorted(set(sys.modules) - before)
import modxfer_fast.kernels
kernels = importlib.util.find_spec('kernels')
result['kernels'] = kernels and str((kernels.origin, kernels.submodule_search_locations))
engine = types.ModuleType('modxfer_fast.engine')
engine.DistillConfig, engine.DistillTrainer = 'config', 'trainer'
result['engine'] = ['modxfer_fast.engine' in sys.modules]
sys.modules['modxfer_fast.engine'] = engine
result['engine'] += [modxfer_fast.DistillConfig, modxfer_fast.DistillTrainer]
"""


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """An interpreter that imports the package, away from the root with its folder `kernels`."""
    return python(IMPORT, tmp_path_factory.mktemp("elsewhere"))


def test_import_asks_no_gpu(imported):
    assert imported  # where it asks, the interpreter ends


def test_import_loads_torch_and_nothing_large(imported):
    loaded = imported["loaded"]
    foreign = {name.split(".")[0] for name in loaded} - {PACKAGE} - set(sys.stdlib_module_names)
    assert foreign <= {"torch"}
    # what torch loads lazily is no part of it either: inductor and dynamo take seconds
    assert not [name for name in loaded if name.startswith(("torch._dynamo", "torch._inductor"))]
    assert len(loaded) < 100


def test_no_top_level_package_named_kernels(imported):
    """Another library owns that name."""
    assert str(ROOT / "kernels") not in (imported["kernels"] or "")


def test_the_engine_is_loaded_when_asked_for(imported):
    assert imported["engine"] == [False, "config", "trainer"]


BARE = """
for name in ('triton', 'transformers', 'pydantic', 'datasets', 'deepspeed', 'rich'):
    sys.modules[name] = None
import torch, modxfer_fast
from modxfer_fast.measure import counting, environment, memory, roofline, timing, tracing
from modxfer_fast.kernels import dispatch
h, w = torch.ones(3, 4, requires_grad=True), torch.ones(5, 4)
modxfer_fast.linear_kd_loss(h, w, h, w).backward()
result['triton'] = dispatch.table()['kd_loss']['triton']
try: modxfer_fast.DistillTrainer
except ModuleNotFoundError as error: result['trainer'] = str(error)
"""


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """An interpreter with neither Triton nor what the engine needs."""
    return python(BARE, tmp_path_factory.mktemp("bare"))


def test_everything_works_without_triton(bare):
    assert bare["triton"]["available"] is False
    assert "triton" in bare["triton"]["reason"]


def test_what_the_engine_needs_is_named(bare):
    # several are missing; the first that is imported is named
    told = re.match(r"DistillTrainer: (\w+) is not installed; pip install", bare["trainer"])
    assert told[1] in ("datasets", "transformers")


def test_names_that_are_loaded_lazily_are_listed():
    lazy = {"CausalCollator", "DistillConfig", "DistillTrainer", "rows_from_documents"}
    assert lazy <= set(modxfer_fast.__all__)
    assert lazy <= set(dir(modxfer_fast))
    assert all(hasattr(modxfer_fast, name) for name in modxfer_fast.__all__)


def test_a_missing_attribute_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = modxfer_fast.no_such_name

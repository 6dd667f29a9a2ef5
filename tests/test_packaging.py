"""What pip builds and installs in every mode of MODXFER_BUILD, used from an empty folder."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
DOCUMENTS = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff", "LICENSE", "Makefile")
SOURCES = (
    *("csrc", "kernels", "modxfer_fast", "benchmarks", "docs", "examples", "tests"),
    *("setup.py", "pyproject.toml", "MANIFEST.in"),
    *DOCUMENTS,
)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """An unpacked sdist of the sources, so that every build below is one of a published version."""
    folder = tmp_path_factory.mktemp("sources")
    left_out = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info", "results")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=left_out)
        else:
            shutil.copy(ROOT / name, folder / name)
    out = tmp_path_factory.mktemp("sdist")
    command = ["setup.py", "--quiet", "sdist", "--dist-dir", str(out)]
    subprocess.run([sys.executable, *command], cwd=folder, check=True, timeout=120)
    (archive,) = out.glob("*.tar.gz")
    shutil.unpack_archive(archive, out)
    return out / archive.name.removesuffix(".tar.gz")


def build(checkout: Path, out: Path, **environment: str) -> subprocess.CompletedProcess:
    """`pip wheel`, as the README has it, from a clean tree."""
    shutil.rmtree(checkout / "build", ignore_errors=True)
    command = ["-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "--no-index"]
    return subprocess.run(
        [sys.executable, *command, "--wheel-dir", str(out), str(checkout)],
        env={**os.environ, "MAX_JOBS": "2", **environment},
        capture_output=True,
        text=True,
        timeout=900,
    )


def install(wheel: Path, target: Path) -> None:
    command = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target"]
    subprocess.run([sys.executable, *command, str(target), str(wheel)], check=True, timeout=120)


def the_wheel(folder: Path) -> Path:
    (wheel,) = folder.glob("*.whl")
    return wheel


def python(target: Path, folder: Path, *arguments: str) -> str:
    """Output of an interpreter that sees `target` and installed packages, but no editable install.

    Those come through .pth files, which only `site` reads.
    """
    paths = [str(target), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MODXFER_")}
    run = subprocess.run(
        [sys.executable, "-S", *arguments],
        cwd=folder,
        env={**environment, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.fixture(scope="module")
def compiled(checkout, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("compiled")
    # what is tested is how it is packed, not how fast it is
    run = build(checkout, out, MODXFER_BUILD="cpu", MODXFER_CXXFLAGS="-O0")
    assert run.returncode == 0, run.stderr
    return the_wheel(out)


@pytest.fixture(scope="module")
def pure(checkout, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("pure")
    run = build(checkout, out, MODXFER_BUILD="none")
    assert run.returncode == 0, run.stderr
    return the_wheel(out)


USE = """
import importlib.util, json, pathlib, sys, warnings
import torch, modxfer_fast
from modxfer_fast.kernels import dispatch
target = pathlib.Path(sys.argv[1])
files = [m.__file__ for n, m in sys.modules.items() if n.startswith("modxfer_fast")]
hidden, weight = torch.randn(5, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
losses = {}
for backend in ("reference", *sys.argv[2:]):
    loss = modxfer_fast.linear_kd_loss(hidden, weight, hidden + 1, weight, backend=backend)
    loss.backward()
    losses[backend] = loss.item()
with warnings.catch_warnings(record=True) as told:
    for _ in range(2):
        modxfer_fast.linear_kd_loss(hidden, weight, hidden + 1, weight).backward()
kernels = importlib.util.find_spec("kernels")
print(json.dumps({
    "elsewhere": [f for f in files if target not in pathlib.Path(f).parents],
    "losses": losses,
    "kernels": None if kernels is None else str(kernels.submodule_search_locations),
    "automatic": dispatch.resolve("kd_loss", hidden),
    "version": modxfer_fast.__version__,
    "warnings": [str(warning.message) for warning in told],
}))
"""


def test_sdist_holds_every_source_and_document(checkout):
    kept = {"csrc": "*", "kernels": "*.py", "modxfer_fast": "*.py", "docs": "*", "examples": "*"}
    for name, pattern in kept.items():
        paths = [path.relative_to(ROOT) for path in (ROOT / name).rglob(pattern)]
        wanted = {
            path for path in paths if (ROOT / path).is_file() and "__pycache__" not in path.parts
        }
        assert wanted
        assert not {path for path in wanted if not (checkout / path).is_file()}
    for name in DOCUMENTS:
        assert (checkout / name).is_file(), name


def contents(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_wheels_hold_the_package_and_no_top_level_kernels(compiled, pure):
    sources = {
        f"modxfer_fast/{path.relative_to(ROOT / 'modxfer_fast').as_posix()}"
        for path in (ROOT / "modxfer_fast").rglob("*.py")
    }
    sources |= {
        f"modxfer_fast/{path.relative_to(ROOT).as_posix()}"
        for path in (ROOT / "kernels").rglob("*.py")
    }
    for wheel in (compiled, pure):
        names = contents(wheel)
        assert sources <= names, sources - names
        tops = {name.split("/")[0] for name in names}
        assert {top for top in tops if not top.endswith(".dist-info")} == {"modxfer_fast"}
        assert any(name.endswith("licenses/LICENSE") for name in names)
    assert {name for name in contents(compiled) if name.endswith(".so")} == {"modxfer_fast/_C.so"}


def test_wheels_say_that_their_types_are_theirs(pure):
    assert "modxfer_fast/py.typed" in contents(pure)


def test_tags_of_the_wheels(compiled, pure):
    """One compiled wheel serves every Python from 3.11; the pure one serves every machine."""
    assert "-cp310-abi3-linux_" in compiled.name
    assert pure.name.endswith("-py3-none-any.whl")


def test_compiled_wheel_works_from_an_empty_folder(compiled, tmp_path):
    target, empty = tmp_path / "target", tmp_path / "empty"
    empty.mkdir()
    install(compiled, target)
    facts = json.loads(python(target, empty, "-c", USE, str(target), "cpp"))
    assert facts["elsewhere"] == []
    assert facts["automatic"] == "cpp"
    assert facts["warnings"] == []
    assert facts["losses"]["cpp"] == pytest.approx(facts["losses"]["reference"], rel=1e-5)
    assert facts["kernels"] is None or str(target) not in facts["kernels"]
    assert not (target / "kernels").exists()


def test_pure_wheel_works_and_says_why_cpp_does_not(pure, tmp_path):
    target, empty = tmp_path / "target", tmp_path / "empty"
    empty.mkdir()
    install(pure, target)
    facts = json.loads(python(target, empty, "-c", USE, str(target)))
    assert facts["elsewhere"] == []
    assert facts["automatic"] == "reference"
    (told,) = facts["warnings"]  # once, not at each call
    assert "reference" in told
    assert "MODXFER_BUILD" in told
    doctor = json.loads(python(target, empty, "-m", "modxfer_fast", "doctor", "--json"))
    assert doctor["version"] == facts["version"]
    for room in doctor["rooms"].values():
        assert room["cpp"]["available"] is False
        assert "MODXFER_BUILD" in room["cpp"]["reason"]
        assert room["reference"] == {"available": True, "reason": ""}


def test_unknown_mode_is_refused(checkout):
    run = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=checkout,
        env={**os.environ, "MODXFER_BUILD": "fast"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode != 0
    assert "MODXFER_BUILD: expected one of auto, cpu, cuda, none, got 'fast'" in run.stderr


def test_cuda_mode_needs_nvcc(checkout, tmp_path):
    (tmp_path / "python").symlink_to(sys.executable)
    run = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=checkout,
        env={**os.environ, "MODXFER_BUILD": "cuda", "PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode != 0
    assert "MODXFER_BUILD=cuda: needs nvcc" in run.stderr


def test_cpu_mode_names_the_missing_compiler(checkout):
    run = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=checkout,
        env={**os.environ, "MODXFER_BUILD": "cpu", "CXX": "no-such-compiler -O1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode != 0
    assert "needs a C++ compiler, found no no-such-compiler on PATH" in run.stderr


ISOLATED = """
import runpy, sys, sysconfig
installed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
sys.path[:] = [path for path in sys.path if path not in installed]
sys.argv = ["setup.py", "--version"]
runpy.run_path("setup.py", run_name="__main__")
"""


def test_isolated_builds_use_the_torch_that_is_installed(checkout, tmp_path):
    """pip hides the installed packages from a build and puts only the required ones beside it."""
    for name in ("setuptools", "_distutils_hack"):
        (tmp_path / name).symlink_to(Path(sysconfig.get_path("purelib")) / name)
    run = subprocess.run(
        [sys.executable, "-c", ISOLATED],
        cwd=checkout,
        env={**os.environ, "MODXFER_BUILD": "cpu", "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode == 0, run.stderr
    required = tomllib.loads((checkout / "pyproject.toml").read_text())["build-system"]["requires"]
    assert not [name for name in required if name.startswith("torch")]


@pytest.fixture(scope="module")
def broken_compiler(tmp_path_factory) -> str:
    """g++, beside an nvcc that fails too."""
    folder = tmp_path_factory.mktemp("compiler")
    for name in ("g++", "nvcc"):
        (folder / name).write_text("#!/bin/sh\necho broken compiler >&2\nexit 1\n")
        (folder / name).chmod(0o755)
    return str(folder / "g++")


def test_auto_survives_compilers_that_fail(checkout, broken_compiler, tmp_path):
    path = os.pathsep.join([str(Path(broken_compiler).parent), os.environ["PATH"]])
    run = build(checkout, tmp_path / "out", MODXFER_BUILD="auto", CXX=broken_compiler, PATH=path)
    assert run.returncode == 0, run.stderr
    assert the_wheel(tmp_path / "out").name.endswith("-py3-none-any.whl")
    install(the_wheel(tmp_path / "out"), tmp_path / "target")
    facts = json.loads(python(tmp_path / "target", tmp_path, "-c", USE, str(tmp_path / "target")))
    assert facts["automatic"] == "reference"


def test_cpu_mode_fails_with_the_compiler(checkout, broken_compiler, tmp_path):
    options = {"CXX": broken_compiler, "MODXFER_CXXFLAGS": "-O1 '-DA=b c'"}
    run = build(checkout, tmp_path / "out", MODXFER_BUILD="cpu", **options)
    assert run.returncode != 0
    printed = run.stderr + run.stdout
    assert "broken compiler" in printed
    assert re.search("-O3 .* -O1 '-DA=b c'", printed)  # the last of two like options holds
    assert not list((tmp_path / "out").glob("*.whl"))


def test_this_installation_works_from_an_empty_folder(tmp_path):
    """Whichever install runs the tests: editable under `make test`."""
    run = subprocess.run(
        [sys.executable, "-c", USE, str(ROOT), "cpp"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    facts = json.loads(run.stdout)
    assert facts["losses"]["cpp"] == pytest.approx(facts["losses"]["reference"], rel=1e-5)
    assert facts["kernels"] is None or str(ROOT) not in facts["kernels"]

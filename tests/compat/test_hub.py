"""The folder for the Hugging Face library `kernels`: whole in itself, and loaded by it."""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import modxfer_fast
from modxfer_fast.compat.hub import write_kernel

H, W, T, U = (
    torch.linspace(-1, 1, n * d).sin().view(n, d) for n, d in ((4, 3), (7, 3), (4, 5), (7, 5))
)

SETUP = """
import importlib.util, json, sys
import torch
sys.modules['modxfer_fast'] = None  # its import raises
folder, result = sys.argv[1], {}
h, w, t, u = (torch.linspace(-1, 1, n * d).sin().view(n, d)
              for n, d in ((4, 3), (7, 3), (4, 5), (7, 5)))
h.requires_grad_()
def measure(loss):
    [gradient] = torch.autograd.grad(loss, h)
    return [loss.item(), gradient.tolist()]
"""

ALONE = (
    SETUP
    + """
for name in ('one', 'two'):  # two versions in one process
    path = f'{folder}/{name}/build/torch-cpu/__init__.py'
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    result[name] = measure(module.linear_kd_loss(h, w, t, u, divergence='jsd', beta=0.3))
print(json.dumps(result))
"""
)

LIBRARY = (
    SETUP
    + """
import pathlib
import kernels
from torch import nn
path = pathlib.Path(folder) / 'one'
result['kernel'] = measure(kernels.get_local_kernel(path, backend='cpu').linear_kd_loss(h, w, t, u))
@kernels.use_kernel_forward_from_hub('LinearKDLoss')
class Plain(nn.Module):
    divergence, beta = 'jsd', 0.3
    def forward(self, student_hidden, student_weight, teacher_hidden, teacher_weight, labels=None):
        raise AssertionError('the fallback ran')
class LigerFusedLinearJSD(nn.Module):
    def __init__(self):
        super().__init__()
        self.jsd_beta, self.temperature, self.ignore_index = 0.3, 1.0, -100
    def forward(self, student_input, student_weight, teacher_input, teacher_weight, shift_labels):
        raise AssertionError('the fallback ran')
kernels.replace_kernel_forward_from_hub(LigerFusedLinearJSD, 'LigerFusedLinearJSD')
names = ('LinearKDLoss', 'LigerFusedLinearJSD')
mapping = {name: {'cpu': kernels.LocalLayerRepository(path, layer_name=name)} for name in names}
mode = kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE
with kernels.use_kernel_mapping(mapping):
    for name, module in zip(names, (Plain(), LigerFusedLinearJSD())):
        module = kernels.kernelize(module, mode=mode, device='cpu')
        result[name] = measure(module(h, w, t, u, None))
print(json.dumps(result))
"""
)


def run(code: str, folder, **env) -> dict:
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        cwd=folder,  # the checkout has a folder `kernels` of its own
        env={"PATH": os.environ["PATH"], "HOME": str(folder), "HF_HUB_OFFLINE": "1", **env},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def ours(**options) -> list:
    hidden = H.clone().requires_grad_()
    loss = modxfer_fast.linear_kd_loss(hidden, W, T, U, backend="reference", **options)
    loss.backward()
    return [loss.item(), hidden.grad.tolist()]


def assert_equal(got: list, expected: list):
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(torch.tensor(a), torch.tensor(b))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("hub")
    write_kernel(place / "one")
    write_kernel(place / "two")
    later = place / "two" / "build" / "torch-cpu"
    for path in later.rglob("*.py"):  # another version has other ops
        path.write_text(path.read_text().replace("modxfer_fast_", "modxfer_fast_two_"))
    return place


def test_nothing_of_ours_is_imported_by_name(folder):
    for path in (folder / "one").rglob("*.py"):
        for line in path.read_text().splitlines():
            assert not line.lstrip().startswith(("import modxfer_fast", "from modxfer_fast")), path


def test_variants_say_what_they_are(folder):
    builds = sorted((folder / "one" / "build").iterdir())
    assert [build.name for build in builds] == ["torch-cpu", "torch-cuda", "torch-rocm"]
    told = [json.loads((build / "metadata.json").read_text()) for build in builds]
    assert [data["backend"]["type"] for data in told] == ["cpu", "cuda", "rocm"]
    assert len({data["id"] for data in told}) == 3


def test_it_runs_without_the_package_and_beside_another_version(folder):
    got = run(ALONE, folder)
    for name in ("one", "two"):
        assert_equal(got[name], ours(divergence="jsd", beta=0.3))


def test_the_kernels_library_loads_it(folder):
    try:
        library = importlib.metadata.distribution("kernels")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the Hugging Face library `kernels` is not installed")
    got = run(LIBRARY, folder, PYTHONPATH=str(library.locate_file("")))
    assert_equal(got["kernel"], ours())
    for name in ("LinearKDLoss", "LigerFusedLinearJSD"):
        assert_equal(got[name], ours(divergence="jsd", beta=0.3))


def test_a_full_disk_leaves_no_half_of_it(tmp_path, monkeypatch):
    write_text = Path.write_text

    def full(path, *args, **kwargs):
        if path.name == "metadata.json":
            raise OSError(28, "No space left on device")
        return write_text(path, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        write_kernel(tmp_path / "one")
    assert list((tmp_path / "one").iterdir()) == []


def test_a_folder_is_not_written_twice(folder):
    with pytest.raises(FileExistsError):
        write_kernel(folder / "one")
    assert sorted(path.name for path in (folder / "one").iterdir()) == ["build"]
    with pytest.raises(ValueError, match="version: expected a positive number, got 0"):
        write_kernel(folder / "three", version=0)

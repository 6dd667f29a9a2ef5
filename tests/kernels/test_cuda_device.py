"""Which GPUs and calls the backend "cuda" refuses, and that it says why before anything runs."""

from types import SimpleNamespace

import pytest
import torch

from modxfer_fast import TeacherTopK, linear_kd_loss, teacher_topk
from modxfer_fast.kernels import dispatch
from modxfer_fast.kernels.common import KDSpec, compiled, cuda_device, gemm
from modxfer_fast.kernels.kd_loss import cpp_impl
from modxfer_fast.kernels.kd_loss import cuda_impl as cuda_rows
from modxfer_fast.kernels.lora_linear import cuda_impl as lora
from modxfer_fast.kernels.lora_linear.config import CUDA_SHARED_BYTES
from tests.emulated import library

KIB = 1024
# capability, and KiB of shared memory that a block may have: CUDA C++ programming guide
A100, L40, H200, B200 = ((8, 0), 163), ((8, 9), 99), ((9, 0), 227), ((10, 0), 227)
B300, RTX_5090, T4 = ((10, 3), 227), ((12, 0), 99), ((7, 5), 64)


@pytest.fixture
def gpus(monkeypatch):
    """Makes torch see such GPUs, beside a build with CUDA."""

    def see(*found):
        properties = [
            SimpleNamespace(
                name="such a GPU", major=major, minor=minor, shared_memory_per_block_optin=kib * KIB
            )
            for (major, minor), kib in found
        ]
        monkeypatch.setattr(compiled, "available", lambda: (True, ""))
        monkeypatch.setattr(compiled, "ops", lambda: SimpleNamespace(kd_loss_cuda=None))
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(found))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(found))
        monkeypatch.setattr(torch.cuda, "get_device_properties", properties.__getitem__)

    return see


@pytest.mark.parametrize(
    ("student", "teacher", "read"),
    [
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.bfloat16, torch.float16, torch.float32),
        (torch.float16, torch.float16, torch.float16),
    ],
    ids=str,
)
def test_rows_are_given_sides_of_one_dtype(monkeypatch, student, teacher, read):
    """The kernels read both by the dtype of the student's."""
    given = []

    def op(name):
        def record(*args):
            given.append((name, args[0].dtype, args[1].dtype))
            return args[:3]

        return record

    names = [f"kd_loss{step}_cuda" for step in ("", "_stats", "_sums", "_write")]
    monkeypatch.setattr(
        compiled, "ops", lambda: SimpleNamespace(**{name: op(name) for name in names})
    )
    monkeypatch.setattr(cuda_rows, "stream", lambda: 0)
    z_s, z_t = torch.zeros(2, 8, dtype=student), torch.zeros(2, 8, dtype=teacher)
    weights, spec = torch.ones(2), KDSpec().checked()
    cuda_rows.kd_loss_fwd(z_s, z_t, None, spec)
    cuda_rows.kd_loss_bwd(z_s, z_t, None, weights, weights, spec, z_s)
    cuda_rows.kd_loss_fwd_bwd(z_s, z_t, None, weights, spec, z_s)
    cuda_rows.kd_loss_stats(z_s, z_t, None, spec, False)
    cuda_rows.kd_loss_sums(z_s, z_t, weights, spec)
    cuda_rows.kd_loss_write(z_s, z_t, None, 8, weights, weights, spec, z_s)
    assert {name for name, _, _ in given} == set(names)
    assert all(one == other == read for _, one, other in given)


@pytest.mark.parametrize("gpu", [A100, L40, H200, B200])
def test_gpus_that_have_code_run_the_rows(gpus, gpu):
    gpus(gpu)
    assert cuda_device.available() == (True, "")


@pytest.mark.parametrize(
    ("gpu", "capability"), [(B300, "10.3"), (RTX_5090, "12.0"), (T4, "7.5")], ids=lambda x: str(x)
)
def test_a_gpu_without_code_is_named(gpus, gpu, capability):
    gpus(H200, gpu)
    ok, reason = cuda_device.available()
    assert not ok
    assert "cuda:1" in reason
    assert capability in reason
    assert "CUDA_VISIBLE_DEVICES" in reason


def test_lora_linears_want_more_shared_memory_than_some_have(gpus):
    for gpu in (A100, H200, B200):
        gpus(gpu)
        assert lora.available()[0]
    gpus(L40)
    ok, reason = lora.available()
    assert not ok
    assert "158 KiB" in reason
    assert "99" in reason


def test_no_pass_wants_more_than_the_reason_says():
    kernels = library("emulated_lora_passes.cpp", checked=False)
    assert kernels.most_shared_bytes() == CUDA_SHARED_BYTES


@pytest.mark.parametrize("most_shared", [99 * KIB, 227 * KIB])
def test_the_longest_list_fits_and_one_more_does_not(most_shared):
    for source, name in (
        ("emulated_topk_kd_loss.cpp", "topk"),
        ("emulated_teacher_topk.cpp", "teacher_topk"),
    ):
        kernels = library(source, checked=False)
        most = getattr(kernels, f"most_{name}")(128256, 100_000, most_shared)
        bytes_of = getattr(kernels, f"{name}_bytes")
        assert 1000 < most < 100_000
        assert bytes_of(128256, most) <= most_shared < bytes_of(128256, most + 1)
        assert getattr(kernels, f"most_{name}")(128256, 64, most_shared) == 64


@pytest.mark.skipif(not compiled.available()[0], reason="csrc is not built")
def test_a_list_without_room_is_refused_before_any_product(monkeypatch):
    def refuse(finds, count, classes, device):
        raise dispatch.BackendError(f"{finds} {count} of {classes}")

    def product(*args):
        raise AssertionError("a product before the refusal")

    monkeypatch.setattr(cpp_impl, "check_listed", refuse, raising=False)
    monkeypatch.setattr(gemm, "project", product)
    hidden, weight = torch.randn(3, 8), torch.randn(20, 8)
    with pytest.raises(dispatch.BackendError, match="True 5 of 20"):
        teacher_topk(hidden, weight, k=5, backend="cpp")
    ids = torch.arange(6).repeat(3, 1)
    teacher = TeacherTopK(ids, torch.full((3, 6), -3.0))
    with pytest.raises(dispatch.BackendError, match="False 6 of 20"):
        linear_kd_loss(hidden, weight, teacher, backend="cpp")

"""relation_loss on a GPU: accuracy, equal bits, one chunk and many, waits, graphs, memory."""

import dataclasses

import pytest
import torch

from modxfer_fast.measure.memory import peak_mib
from tests.gpu import backend_on, no_waiting, recorded, to_device
from tests.inputs import DTYPES
from tests.relation_inputs import check_results, loss_and_grads, make_inputs

pytestmark = pytest.mark.first
# sequences, tokens, widths of a head; 1 MiB holds a part of the logits on a GPU
SIZES = {"cpu": (3, 11, 8, 12), "cuda": (3, 300, 32, 64)}


def make(device: str, dtype: torch.dtype, **options):
    batch, seq, d_s, d_t = SIZES[device]
    return make_inputs(batch, seq, dtype, d_s=d_s, d_t=d_t, **options)


def run(inputs, device: str, **options):
    return loss_and_grads(inputs, backend=backend_on(device, "relation_loss"), **options)


@pytest.mark.parametrize("is_self", [False, True], ids=["cross", "self"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("mask", [None, "right", "left", "holes"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_accuracy_and_bits(dtype, mask, causal, is_self, device):
    inputs = make(device, dtype, mask=mask, causal=causal, is_self=is_self)
    moved = to_device(inputs, device)
    runs = [run(moved, device, workspace_mb=mb) for mb in (64, 64, 1)]
    for name, result in runs[0].items():
        assert torch.equal(result, runs[1][name]), name
    for results in runs[1:]:
        here = {name: result.cpu() for name, result in results.items()}
        check_results(here, inputs, inputs.weights())


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_waits_for_the_gpu(dtype, causal, device):
    inputs = make(device, dtype, mask="right", causal=causal, token_weights=True)
    inputs = to_device(inputs, device)
    run(inputs, device)  # compiles
    with no_waiting(device):
        run(inputs, device)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_a_captured_graph_follows_its_inputs(dtype, device):
    static = to_device(make(device, dtype, mask="right", causal=True), device)
    replay = recorded(lambda: run(static, device), device)
    for seed in (1, 2):
        inputs = make(device, dtype, mask="right", causal=True, seed=seed)
        for field in dataclasses.fields(inputs):
            value = getattr(inputs, field.name)
            if isinstance(value, torch.Tensor):
                getattr(static, field.name).data.copy_(value.detach())
        here = {name: result.cpu() for name, result in replay().items()}
        check_results(here, inputs, inputs.weights())


def test_peak_memory_is_flat_in_the_sequence(device):
    """Relations of a long sequence are never whole: [B, heads, T, T] would be 30 times as much."""
    if backend_on(device, "relation_loss") == "reference":
        pytest.skip("the reference stores whole relations, and compiled kernels were not built")
    seq = {"cpu": 600, "cuda": 8192}[device]
    workspace_mb = {"cpu": 1, "cuda": 64}[device]
    inputs = to_device(make_inputs(2, seq, torch.bfloat16, d_s=8, d_t=8, num_heads=4), device)
    step = lambda: run(inputs, device, workspace_mb=workspace_mb)
    step()  # cuBLAS keeps a workspace of its own from its first product on
    whole = 2 * 4 * 4 * seq**2 * 2 / 2**20
    assert peak_mib(step, device) <= whole / 8

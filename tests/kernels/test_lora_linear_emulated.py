"""The CUDA passes of LoRA linears on the emulator, by the checks of the room's other kernels."""

import importlib
import itertools

import pytest
import torch

from modxfer_fast.kernels import env
from modxfer_fast.kernels.common import compiled, cuda_device
from modxfer_fast.kernels.lora_linear import cuda_passes
from modxfer_fast.kernels.lora_linear.dropout import dropout_bits
from tests.emulated.lora_passes import EmulatedOps, place_of
from tests.lora_inputs import BF16, BF16_FP32, DTYPES, FP16, FP32, check, lora_inputs, small_group
from tests.support.lora_passes import check_passes, results_of_passes

pytestmark = pytest.mark.usefixtures("poisoned_memory")
# blocks of 16 rows, one part of the columns each or several; blocks of 64 rows
FEW, MANY = 132, 1


@pytest.fixture
def emulate(monkeypatch):
    """Puts the emulator in the place of the compiled ops."""

    def use(**options) -> None:
        monkeypatch.setattr(compiled, "ops", lambda: EmulatedOps(**options))
        monkeypatch.setattr(cuda_device, "stream", lambda: 0)

    use()
    return use


@pytest.mark.parametrize("multiprocessors", [FEW, MANY], ids=["few-rows", "many-rows"])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_unlike_targets(dtypes, multiprocessors, emulate):
    emulate(multiprocessors=multiprocessors)
    check_passes(small_group(dtypes))


# within, at and past the rank tiles of a launch, and several blocks of ranks
RANKS = (1, 8, 16, 17, 32, 33, 64, 65, 256)


@pytest.mark.parametrize("dtypes", [FP32, BF16, BF16_FP32], ids=["fp32", "bf16", "bf16+fp32"])
@pytest.mark.parametrize("rank", RANKS, ids=lambda r: f"R{r}")
def test_ranks(rank, dtypes, emulate):
    check_passes(lora_inputs(18, 40, (23,), dtypes, ranks=(rank,)))


@pytest.mark.parametrize("dtypes", [FP32, FP16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("m", [1, 15, 17, 33, 64, 65, 130], ids=lambda m: f"M{m}")
def test_rows(m, dtypes, emulate):
    """Several shares of rows, and stages of them that are not full."""
    emulate(multiprocessors=MANY)
    check_passes(lora_inputs(m, 40, (23, 9), dtypes))


def test_no_rows(emulate):
    results = check_passes(lora_inputs(0, 40, (23, 9)))
    assert all((result == 0).all() for result in results.values())


# one column; below, at and past a word of the mask, a stage of shrink and a block of the backward
WIDTHS = [(1, 1), (31, 257), (32, 64), (33, 255), (64, 65), (127, 1), (129, 40), (257, 256)]


@pytest.mark.parametrize("dtypes", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("k", "n"), WIDTHS, ids=[f"K{k}-N{n}" for k, n in WIDTHS])
def test_widths(k, n, dtypes, emulate):
    check_passes(lora_inputs(5, k, (n,), dtypes))


@pytest.mark.parametrize("multiprocessors", [FEW, MANY], ids=["few-rows", "many-rows"])
def test_stages_in_turn(multiprocessors, emulate):
    """More stages than there are, of columns and of rows."""
    emulate(multiprocessors=multiprocessors)
    check_passes(lora_inputs(300, 640, (40,), BF16, ranks=(16,)))


@pytest.mark.parametrize("most_shared", [130, 227], ids=lambda kib: f"{kib}KiB")
@pytest.mark.parametrize("count", [2, 4, 9, 18], ids=lambda t: f"T{t}")
def test_groups(count, most_shared, emulate):
    """Slots of one block and of several; more targets than the arguments of a launch hold."""
    emulate(most_shared=most_shared)
    ranks, dropouts = (8, 1, 16, 3), (0.5, 0.0, 0.1, 0.9, 1.0)
    check_passes(lora_inputs(9, 50, (9,) * count, BF16, ranks=ranks, dropouts=dropouts))


SEEDS = [0, -1, 2**63 - 1, 0x123456789ABCDEF]


@pytest.mark.parametrize("seed", SEEDS)
def test_masks_are_those_of_every_backend(seed, emulate):
    dropouts = (0.5, 2**-16, 0.0, 1.0)
    inputs = lora_inputs(21, 70, (9,) * 4, BF16, dropouts=dropouts)
    seed = torch.tensor(seed)
    _, bits = cuda_passes.shrink(inputs.x.detach(), inputs.targets, seed)
    expected = dropout_bits(seed, 21, 70, list(dropouts))
    assert torch.equal(bits, expected)


LAYOUTS = {
    "sliced": lambda t: torch.nn.functional.pad(t, (3, 5), value=float("nan"))[:, 3:-5],
    "aligned": lambda t: torch.nn.functional.pad(t, (8, 16), value=float("nan"))[:, 8:-16],
    "every-other-column": lambda t: torch.repeat_interleave(t, 2, 1)[:, ::2],
    "transposed": lambda t: t.t().contiguous().t(),
    "expanded-rows": lambda t: t[:1].expand_as(t),
    "expanded-columns": lambda t: t[:, :1].expand_as(t),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtypes", [FP32, BF16], ids=["fp32", "bf16"])
def test_layouts(dtypes, layout, emulate):
    inputs = lora_inputs(7, 48, (24, 12), dtypes)
    inputs.x = LAYOUTS[layout](inputs.x.detach()).requires_grad_()
    inputs.dys = [LAYOUTS[layout](dy) for dy in inputs.dys]
    check_passes(inputs)


NEEDS = list(itertools.product([True, False], repeat=2))


@pytest.mark.parametrize("need_dx", [True, False], ids=["dx", "no-dx"])
@pytest.mark.parametrize("need_da", NEEDS, ids=str)
@pytest.mark.parametrize("need_db", NEEDS, ids=str)
def test_what_is_asked_for(need_db, need_da, need_dx, emulate):
    needs = {"need_dx": need_dx, "need_da": need_da, "need_db": need_db}
    results = check_passes(lora_inputs(5, 40, (23, 9), BF16), **needs)
    assert ("x" in results) == need_dx
    for index in range(2):
        assert (f"lora_a{index}" in results) == need_da[index]
        assert (f"lora_b{index}" in results) == need_db[index]


# what 8 lanes read together: two rows of four chunks, or four rows of two
QUARTERS = {
    "over-columns": [(row, chunk) for row in range(2) for chunk in range(4)],
    "over-rows": [(row, chunk) for row in range(4) for chunk in range(2)],
}


@pytest.mark.parametrize("size", [2, 4], ids=["halves", "floats"])
@pytest.mark.parametrize("quarter", QUARTERS)
def test_no_two_lanes_of_a_quarter_meet_in_a_bank(quarter, size):
    chunks = size // 2  # of eight numbers
    for row, eight, part in itertools.product(range(0, 32, 4), range(0, 32, 4), range(chunks)):
        places = [
            place_of(size, 64, row + r, chunks * (eight + e) + part) for r, e in QUARTERS[quarter]
        ]
        assert len({place // 16 % 8 for place in places}) == 8


@pytest.mark.parametrize("dtypes", [FP32, BF16, BF16_FP32], ids=["fp32", "bf16", "bf16+fp32"])
def test_bits_are_equal_whoever_goes_on_and_nothing_races(dtypes, emulate):
    inputs = small_group(dtypes, m=70, k=300)
    emulate(multiprocessors=MANY)
    first = results_of_passes(inputs)
    for seed in range(1, 4):
        emulate(multiprocessors=MANY, seed=seed, checked=seed == 3)
        for name, result in results_of_passes(inputs).items():
            assert torch.equal(result, first[name]), name


@pytest.mark.skipif(not env.triton_interpreted(), reason="runs a Triton kernel on a CPU")
@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
def test_passes_and_products_together(emulate, monkeypatch):
    """The backend as it is on Hopper; the kernel of its products is plain PyTorch here."""
    triton_impl = pytest.importorskip("modxfer_fast.kernels.lora_linear.triton_impl")
    cuda_impl = importlib.import_module("modxfer_fast.kernels.lora_linear.cuda_impl")
    plain_sums = importlib.import_module("tests.support.lora_products").plain_sums
    monkeypatch.setattr(triton_impl, "lora_linear_fwd", cuda_impl.lora_linear_fwd)
    monkeypatch.setattr(triton_impl, "lora_linear_bwd", cuda_impl.lora_linear_bwd)
    sums = plain_sums(monkeypatch)
    inputs = lora_inputs(18, 40, (24, 16), BF16, ranks=(8,), dropouts=(0.25, 0.0), bias=(True,))
    check(inputs, backend="triton")
    ys = [("y", [40, 8], False, True)] * 2
    assert sums == [*ys, ("dx", [24, 16, 8], True, False)]

"""The Triton kernels of lora_linear, interpreted on a CPU: tiles, strides and launches.

Values and gradients of every kind of input are in test_lora_linear.py; here are the sizes at
which a launch changes shape.
"""

import itertools

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from benchmarks.lora import with_base
from modxfer_fast.kernels import env
from modxfer_fast.kernels.lora_linear import (
    triton_backward,
    triton_expand,
    triton_impl,
    triton_products,
    triton_reduce,
    triton_shrink,
)
from modxfer_fast.kernels.lora_linear.config import (
    Gpu,
    da_config,
    ds_db_config,
    multiplies_base_apart,
    padded_rank,
    product_config,
    shrink_config,
)
from modxfer_fast.kernels.lora_linear.dropout import dropout_bits
from tests.lora_inputs import (
    BF16,
    BF16_FP32,
    DTYPES,
    FP32,
    check,
    lora_inputs,
    plain_of,
    run,
    small_group,
    truth_of,
)

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    # NumPy, which interprets Triton, warns of infinities that the kernels mask
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]
interpreted = pytest.mark.skipif(
    not env.triton_interpreted(), reason="a GPU is present: test_lora_linear_gpu.py runs there"
)
GPUS = [
    *(Gpu("cuda", capability) for capability in (80, 89, 90, 100, 120)),
    Gpu("hip", 0),
]
KERNELS = {
    triton_shrink: ("shrink",),
    triton_expand: ("expand",),
    triton_backward: ("ds_db", "dx", "da"),
    triton_reduce: ("reduce",),
}


@interpreted
@pytest.mark.parametrize(
    ("rows", "dtypes"),
    [(520, FP32), (200, BF16), (200, BF16_FP32)],
    ids=["fp32", "bf16", "bf16+fp32"],
)
def test_several_tiles_of_everything(rows, dtypes):
    """Two column tiles of each kernel, several splits of the rows; once more than GROUP_M tiles."""
    check(lora_inputs(rows, 70, (130, 20), dtypes, dropouts=(0.5, 0.0)), backend="triton")


@interpreted
@pytest.mark.parametrize("num_targets", [1, 3])
@pytest.mark.parametrize("rank", [17, 33, 65, 200])
def test_ranks_of_several_blocks(rank, num_targets):
    """Ranks are cut over the grid in the skinny passes and over steps in the products."""
    inputs = lora_inputs(20, 70, (24, 40, 8)[:num_targets], ranks=(rank, 3, rank // 2))
    check(inputs, backend="triton")


@interpreted
def test_programs_of_higher_ranks_agree_on_the_mask():
    inputs = lora_inputs(40, 130, (24, 8, 8, 8), ranks=(130,), dropouts=(0.3, 0.0, 0.9, 1.0))
    config = shrink_config(40, 130, 4, 4, Gpu("cuda", 80))
    assert config.block_r < 130
    _, bits = triton_impl.shrink(inputs.x.detach(), inputs.targets, inputs.seed)
    expected = dropout_bits(inputs.seed, 40, 130, [0.3, 0.0, 0.9, 1.0])
    assert torch.equal(bits, expected)


@interpreted
@pytest.mark.parametrize("part", ["weight", "lora_a", "lora_b", "bias"])
def test_strided_parameters(part):
    inputs = lora_inputs(9, 70, (24, 40), bias=(True,))
    expected = run(inputs, backend="triton")
    for index, target in enumerate(inputs.targets):
        tensor = getattr(target, part).detach()
        wide = torch.full((*tensor.shape, 2), float("nan"))
        wide[..., 0] = tensor
        strided = (wide[..., 0] if part == "bias" else tensor.t().contiguous().t()).requires_grad_()
        assert not strided.is_contiguous()
        inputs.targets[index] = target._replace(**{part: strided})
    results = run(inputs, backend="triton")
    for name, result in results.items():
        assert torch.equal(result, expected[name]), name


@interpreted
def test_two_runs_are_equal():
    inputs = lora_inputs(70, 70, (130, 24))
    first, second = (run(inputs, backend="triton") for _ in range(2))
    for name, result in first.items():
        assert torch.equal(result, second[name]), name


@pytest.fixture
def launches(monkeypatch):
    """Names of the kernels in the order they are launched."""
    names = []

    class Counted:
        def __init__(self, name, kernel):
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid):
            names.append(self.name)
            return self.kernel[grid]

    for module, kernels in KERNELS.items():
        for name in kernels:
            kernel = getattr(module, f"_{name}_kernel")
            monkeypatch.setattr(module, f"_{name}_kernel", Counted(name, kernel))
    return names


@interpreted
def test_a_group_costs_two_launches_forward_and_five_backward(launches):
    inputs = lora_inputs(9, 40, (24, 8, 8))
    inputs.require("x", "lora_a", "lora_b")
    run(inputs, backend="triton")
    assert launches == ["shrink", "expand", "ds_db", "reduce", "dx", "da", "reduce"]


@interpreted
@pytest.mark.parametrize(
    ("needs", "backward"),
    [
        (("x",), ["ds_db", "reduce", "dx"]),
        (("lora_a",), ["ds_db", "reduce", "da", "reduce"]),
        (("lora_b",), ["ds_db", "reduce"]),
        (("lora_a0",), ["ds_db", "reduce", "da", "reduce"]),
    ],
    ids=["x", "lora_a", "lora_b", "one lora_a"],
)
def test_what_is_not_needed_is_not_launched(launches, needs, backward):
    inputs = lora_inputs(9, 40, (24, 8))
    inputs.require(*needs)
    run(inputs, backend="triton", dys=inputs.dys)
    assert launches == ["shrink", "expand", *backward]


@interpreted
@pytest.mark.parametrize(("rows", "width"), [(0, 40), (5, 0), (0, 0)])
def test_nothing_to_do(rows, width):
    results = run(lora_inputs(rows, width or 1, (24, 8)), backend="triton")
    assert all(result.isfinite().all() for result in results.values())
    if width == 0:
        inputs = lora_inputs(rows, 1, (24, 8), bias=(True,))
        inputs.x = inputs.x.detach()[:, :0]
        inputs.targets = [
            target._replace(weight=target.weight[:, :0], lora_a=target.lora_a[:, :0])
            for target in inputs.targets
        ]
        for y, target in zip(
            triton_impl.lora_linear_fwd(inputs.x, inputs.targets, inputs.seed)[0],
            inputs.targets,
            strict=True,
        ):
            assert torch.equal(y, target.bias.expand(rows, -1))


# --- products with the base by a library


@pytest.fixture
def products(monkeypatch):
    """Shapes (rows, terms, columns) of the products that are left to a library, which all are."""
    shapes, addmm = [], torch.Tensor.addmm_

    def recorded(result, left, right):
        shapes.append((*left.shape, right.shape[1]))
        return addmm(result, left, right)

    monkeypatch.setattr(torch.Tensor, "addmm_", recorded)
    monkeypatch.setattr(triton_products, "multiplies_base_apart", lambda *sizes: True)
    return shapes


@interpreted
@pytest.mark.parametrize("dtypes", DTYPES)
def test_base_apart(dtypes, products, launches):
    inputs = small_group(dtypes)  # the third target's base is elsewhere
    check(inputs, backend="triton")
    assert products == [(13, 70, 40), (13, 70, 23), (13, 40, 70), (13, 23, 70)]
    assert launches == ["shrink", "expand", "ds_db", "reduce", "dx", "da", "reduce"]


@interpreted
@pytest.mark.parametrize("part", ["x", "weight", "dys"])
def test_base_apart_of_any_strides(part, products):
    strided = lambda tensor: torch.repeat_interleave(tensor.detach(), 2, -1)[..., ::2]
    inputs = lora_inputs(7, 40, (23, 12), BF16)
    if part == "x":
        inputs.x = strided(inputs.x).requires_grad_()
    elif part == "dys":
        inputs.dys = [dy[:, :1].expand_as(dy) for dy in inputs.dys]
    else:
        weights = [strided(target.weight).t().contiguous().t() for target in inputs.targets]
        pairs = zip(inputs.targets, weights, strict=True)
        inputs.targets = [target._replace(weight=w.requires_grad_()) for target, w in pairs]
    check(inputs, backend="triton")
    assert len(products) == 4


@interpreted
@pytest.mark.parametrize("dtypes", DTYPES[1:])
def test_base_apart_is_no_worse_than_peft(dtypes, products):
    """In the norm: a part that is rounded before the product is added costs less than PEFT's."""
    options = {"dropouts": (0.1,), "ranks": (16,), "scalings": (0.25,)}
    inputs = lora_inputs(64, 130, (70, 40), dtypes, **options)
    results, truth, plain = run(inputs, backend="triton"), truth_of(inputs), plain_of(inputs)
    for name in ("y0", "y1", "x"):
        error = (results[name].double() - truth[name]).norm()
        assert error <= 1.05 * (plain[name].double() - truth[name]).norm(), name


@interpreted
def test_a_benchmark_times_both_ways(products):
    inputs = lora_inputs(5, 40, (23,), BF16)
    step = lambda: run(inputs, backend="triton")
    with_base(False, step)()
    assert not products
    with_base(True, step)()
    assert products == [(5, 40, 23), (5, 23, 40)]


def test_what_is_multiplied_apart():
    apart = lambda rows, columns, summed, **options: multiplies_base_apart(
        rows, columns, summed, **({"itemsize": 2, "touches": 2, "precision": "half"} | options)
    )
    assert apart(8192, 4096, 4096)
    assert apart(2048, 14336, 4096)
    assert not apart(128, 4096, 4096)  # too few tiles to fill a GPU
    assert not apart(8192, 1024, 1024)  # reading the part again costs what the product saves
    assert not apart(8192, 4096, 0)  # no base
    # gradients of three targets in one sum, which a library writes three times
    assert not apart(8192, 2048, 2048 + 2 * 512, touches=6)
    assert apart(8192, 4096, 4096 + 2 * 1024, touches=6)
    # fp32 without tensor cores is bound by its products, whatever is read again
    assert apart(8192, 1024, 1024, itemsize=4, precision="ieee")
    assert not apart(8192, 1024, 1024, itemsize=4, precision="tf32")


# --- configurations


@pytest.mark.parametrize("gpu", GPUS, ids=str)
def test_launches_are_within_hardware_limits(gpu):
    warp_size = 64 if gpu.backend == "hip" else 32
    for rows, columns, rank, itemsize in itertools.product(
        (1, 100, 2048, 8192, 2**20), (1, 1000, 4096, 28672), (1, 16, 24, 64, 1000), (2, 4)
    ):
        for is_exact, second, crowded in itertools.product((False, True), repeat=3):
            config = product_config(
                rows,
                columns,
                rank,
                itemsize,
                gpu,
                is_exact=is_exact,
                is_masked_sum=second,
                is_crowded=crowded,
            )
            tile = config.block_m * config.block_n
            assert config.block_r >= 16  # what tl.dot multiplies at least
            # fp32 accumulators of a thread leave room for operands and addresses
            assert tile <= 128 * config.num_warps * warp_size
            assert not (second and tile > 128 * 128)
            step = (config.block_m + config.block_n) * config.block_l * itemsize
            buffers = config.num_stages - (gpu.backend == "hip")
            ranks = 4 * config.block_r * (config.block_m + config.block_n)
            assert step * buffers + ranks <= 1024 * gpu.shared_kib
        for config in (
            shrink_config(rows, rank, 3, itemsize, gpu),
            ds_db_config(rows, columns, rank, itemsize, gpu),
            da_config(rows, columns, rank, 3, itemsize, gpu),
        ):
            assert 16 <= config.block_r <= padded_rank(rank)
            assert config.block_n % 32 == 0  # whole words of the mask
            step = config.block_m * config.block_n * itemsize
            assert step * config.num_stages <= 1024 * gpu.shared_kib
            for number in (config.block_m, config.block_n, config.block_r, config.num_warps):
                assert number & (number - 1) == 0


def test_rows_are_split_for_two_programs_a_multiprocessor():
    for rows, columns in ((8192, 4096), (2048, 1536), (100, 4096), (2**20, 256)):
        config = ds_db_config(rows, columns, 16, 2, Gpu("cuda", 90))
        assert config.split_rows % config.block_m == 0
        programs = -(-columns // config.block_n) * -(-rows // config.split_rows)
        assert programs <= 264 or config.split_rows == config.block_m
        # one block of rows less a program, and there are too many of them
        fewer = config.split_rows - config.block_m
        assert fewer == 0 or -(-columns // config.block_n) * -(-rows // fewer) > 264 * 0.9


def test_a_small_product_gets_small_tiles():
    gpu = Gpu("cuda", 90)
    small, medium, large = (product_config(rows, 4096, 16, 2, gpu) for rows in (256, 1024, 8192))
    assert small.block_m * small.block_n <= medium.block_m * medium.block_n
    assert (large.block_m, large.block_n) == (128, 256)
    assert product_config(8192, 4096, 16, 2, Gpu("cuda", 120)).block_n == 128


@pytest.mark.parametrize(("rank", "padded"), [(1, 16), (16, 16), (17, 32), (64, 64), (100, 128)])
def test_padded_rank(rank, padded):
    assert padded_rank(rank) == padded

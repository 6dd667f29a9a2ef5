"""The LoRA dropout mask: Philox against its published vectors, statistics, and equal backends."""

import itertools
import math
import random

import pytest
import torch
from torch import Tensor

from modxfer_fast.kernels import dispatch
from modxfer_fast.kernels.lora_linear import LoraTarget, lora_linear, lora_linear_group
from modxfer_fast.kernels.lora_linear.dropout import (
    draw_seed,
    dropout_bits,
    num_words,
    threshold,
    unpack,
)
from tests.lora_inputs import BACKENDS, lora_inputs

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    # NumPy, which interprets Triton, warns of infinities that the kernels mask
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]
SEEDS = [0, 1, -1, 2**32, 2**63 - 1, -(2**63), 0x123456789ABCDEF]


def masks(seed: int, rows: int, width: int, dropouts: list[float]) -> Tensor:
    """[T, rows, width] bool."""
    return unpack(dropout_bits(torch.tensor(seed), rows, width, dropouts), width)


# --- the generator


def philox4x32_7(counter: list[int], key: list[int]) -> list[int]:
    """Written from Salmon et al., section 3.3, on Python's integers."""
    for _ in range(7):
        first, second = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [
            (second >> 32) ^ counter[1] ^ key[0],
            second & 0xFFFFFFFF,
            (first >> 32) ^ counter[3] ^ key[1],
            first & 0xFFFFFFFF,
        ]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return counter


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        (
            "00000000 00000000 00000000 00000000",
            "00000000 00000000",
            "5f6fb709 0d893f64 4f121f81 4f730a48",
        ),
        (
            "ffffffff ffffffff ffffffff ffffffff",
            "ffffffff ffffffff",
            "5207ddc2 45165e59 4d8ee751 8c52f662",
        ),
        (
            "243f6a88 85a308d3 13198a2e 03707344",
            "a4093822 299f31d0",
            "4dfccaba 190a87f0 c47362ba b6b5242a",
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_known_answers(counter, key, expected):
    """From kat_vectors of Random123, the authors' library."""
    counter, key, expected = (
        [int(word, 16) for word in t.split()] for t in (counter, key, expected)
    )
    assert philox4x32_7(counter, key) == expected


@pytest.mark.parametrize("seed", SEEDS)
def test_every_bit_is_the_one_of_the_layout(seed):
    rows, width, dropouts = 3, 70, [0.3, 0.5]
    key = [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF]
    found = masks(seed, rows, width, dropouts)
    for t, dropout in enumerate(dropouts):
        for m in range(rows):
            for k in range(width):
                word, draw, half = k // 32, k % 32 // 8, k % 8
                output = philox4x32_7([4 * word + draw, m, 0, t], key)
                uniform = (output[half // 2] >> (16 * (half % 2))) & 0xFFFF
                assert found[t, m, k].item() == (uniform >= round(dropout * 65536)), (t, m, k)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", SEEDS)
def test_backends_draw_the_same_bits(seed, backend):
    rows, width, dropouts = 9, 70, [0.1, 0.0, 0.5, 1.0]
    inputs = lora_inputs(rows, width, (8,) * 4, ranks=(2,), dropouts=dropouts)
    columns = [[getattr(t, part) for t in inputs.targets] for part in LoraTarget._fields]
    seed = torch.tensor(seed)
    _, _, bits = torch.ops.modxfer.lora_linear_fwd(inputs.x.detach(), *columns, seed, backend)
    assert bits.dtype == torch.int32
    # those past the width, too
    assert torch.equal(bits, dropout_bits(seed, rows, width, dropouts))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [1, 4, 10])
def test_bits_do_not_depend_on_the_rows_behind(rows, backend):
    inputs = lora_inputs(11, 40, (8, 8), ranks=(2,), dropouts=(0.5,))
    module, x = dispatch.load("lora_linear", backend), inputs.x.detach()
    targets = [t._replace(weight=None, bias=None) for t in inputs.targets]
    with torch.no_grad():
        _, _, whole = module.lora_linear_fwd(x, targets, inputs.seed)
        _, _, part = module.lora_linear_fwd(x[:rows], targets, inputs.seed)
    assert torch.equal(part, whole[:, :rows])


# --- its statistics


ROWS, WIDTH = 512, 1024


def assert_rate(dropped: Tensor, probability: float, what: str) -> None:
    """The share of True is within five standard deviations of `probability`."""
    sigma = math.sqrt(probability * (1.0 - probability) / dropped.numel())
    error = dropped.double().mean().item() - probability
    assert abs(error) <= 5.0 * sigma, f"{what}: off by {error / sigma:.1f} sigma"


@pytest.mark.parametrize("dropout", [2**-16, 0.001, 0.05, 0.1, 0.5, 0.9, 0.999])
def test_rate(dropout):
    dropped = ~masks(7, ROWS, WIDTH, [dropout, dropout])
    probability = threshold(dropout) / 65536
    assert_rate(dropped, probability, "all")
    if dropout >= 0.05:
        for axis in (1, 2):  # no row and no column is unlike the others
            counts, length = dropped[0].sum(axis - 1).double(), dropped.shape[axis]
            sigma = math.sqrt(length * probability * (1.0 - probability))
            assert (counts - length * probability).abs().max() <= 5.5 * sigma
            assert counts.std() == pytest.approx(sigma, rel=0.25)


@pytest.mark.parametrize("dropout", [0.1, 0.5])
def test_neighbours_are_independent(dropout):
    dropped, probability = ~masks(11, ROWS, WIDTH, [dropout] * 3), threshold(dropout) / 65536
    pairs = {f"targets {a} and {b}": (dropped[a], dropped[b]) for a, b in ((0, 1), (1, 2), (0, 2))}
    pairs |= {f"rows {lag} apart": (dropped[:, lag:], dropped[:, :-lag]) for lag in (1, 2, 32, 128)}
    # of one word of output, of one draw, of two draws, of two words of the mask
    pairs |= {
        f"columns {lag} apart": (dropped[..., lag:], dropped[..., :-lag])
        for lag in (1, 2, 4, 7, 8, 16, 32, 64)
    }
    for seed in (10, 12, 11 + 2**32, 11 + 2**63 - 2**64):
        pairs[f"seed {seed}"] = (dropped[:1], ~masks(seed, ROWS, WIDTH, [dropout]))
    for what, (one, other) in pairs.items():
        assert_rate(one & other, probability**2, what)
        assert_rate(one, probability, what)


def test_probability_in_steps_of_2_to_the_minus_16():
    steps = [0.0, 2**-16, 2**-15, 0.25, 0.25 + 2**-16, 0.5, 1.0 - 2**-16, 1.0]
    assert [threshold(step) for step in steps] == [0, 1, 2, 16384, 16385, 32768, 65535, 65536]
    assert threshold(0.25 + 2**-18) == threshold(0.25)
    # of one target and seed, what a smaller probability drops a larger one drops, too
    kept = [masks(5, ROWS, WIDTH, [step])[0] for step in steps]
    for more, fewer in itertools.pairwise(kept):
        assert (fewer <= more).all()
        assert not torch.equal(fewer, more)
    assert kept[0].all()
    assert not kept[-1].any()


# --- where the seed comes from


def call(dropout: float, backend: str | None = None, **options) -> Tensor:
    inputs = lora_inputs(9, 70, ranks=(4,), dropouts=(dropout,))
    ((weight, lora_a, lora_b, scaling, bias, dropout),) = inputs.targets
    return lora_linear(
        *(inputs.x, weight, lora_a, lora_b),
        **{"scaling": scaling, "bias": bias, "dropout": dropout, "backend": backend} | options,
    ).detach()


@pytest.mark.parametrize("backend", BACKENDS)
def test_manual_seed_decides_and_two_calls_differ(backend):
    torch.manual_seed(3)
    first, second = call(0.5, backend), call(0.5, backend)
    torch.manual_seed(3)
    assert torch.equal(call(0.5, backend), first)
    assert torch.equal(call(0.5, backend), second)
    assert not torch.equal(first, second)


def test_the_seed_is_drawn_from_torch_and_may_be_given():
    torch.manual_seed(3)
    drawn = call(0.5)
    torch.manual_seed(3)
    seed = draw_seed(torch.device("cpu"))
    state = torch.get_rng_state()
    assert torch.equal(call(0.5, seed=seed), drawn)
    assert torch.equal(call(0.5, seed=seed.reshape(1)), drawn)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(call(0.5, seed=seed + 1), drawn)


def test_the_seed_is_not_changed():
    seed = torch.tensor(5)
    call(0.5, seed=seed)
    assert seed.item() == 5
    assert seed._version == 0


def test_no_dropout_draws_nothing():
    state = torch.get_rng_state()
    call(0.0)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_group_draws_once():
    inputs = lora_inputs(9, 70, (8, 8, 8), dropouts=(0.5, 0.0, 0.1))
    torch.manual_seed(3)
    draw_seed(torch.device("cpu"))
    state = torch.get_rng_state()
    torch.manual_seed(3)
    lora_linear_group(inputs.x, inputs.targets)
    assert torch.equal(torch.get_rng_state(), state)


def test_python_s_generator_is_left_alone():
    random.seed(1)
    state = random.getstate()
    torch.manual_seed(3)
    first = call(0.5)
    assert random.getstate() == state
    random.seed(2)
    torch.manual_seed(3)
    assert torch.equal(call(0.5), first)


def test_width_in_words():
    assert [num_words(width) for width in (0, 1, 31, 32, 33, 64, 65)] == [0, 1, 1, 1, 2, 2, 3]
    assert dropout_bits(torch.tensor(1), 0, 40, [0.5]).shape == (1, 0, 2)

"""The gates of linear_kd_loss on a CPU: what is compared with what, and a run of a tiny shape."""

import itertools

import pytest

from benchmarks import cpu_gates
from benchmarks.bench_linear_kd_loss import FROZEN, TRAINABLE
from modxfer_fast.kernels import dispatch

TIMES = {
    TRAINABLE: [1.0, 2.0, 4.0],
    FROZEN: [1.0, 1.0, 1.0],
    cpu_gates.OURS: [1.05, 2.1, 4.8],
    cpu_gates.FROZEN: [1.07, 1.07, 1.07],
    "eager": [1.1, 2.0, 6.0],
    f"bf16 {cpu_gates.OURS}": [1.47, 2.94, 9.0],
}


def test_ratios_are_of_one_round_and_held_against_their_gate():
    found = {v.name: v for v in cpu_gates.verdicts(TIMES, rows=1024)}
    ratios = {name: round(verdict.ratio, 6) for name, verdict in found.items()}
    assert ratios == {
        "ours cpp of gemms x4": 1.05,
        "ours cpp, bf16 of fp32": 1.4,
        "ours cpp, frozen head of gemms x3, frozen head": 1.07,
        "ours cpp of eager": 0.954545,
    }
    missed = [name for name, verdict in found.items() if verdict.is_missed]
    assert missed == ["ours cpp, bf16 of fp32", "ours cpp, frozen head of gemms x3, frozen head"]
    assert str(found[missed[0]]).startswith("MISSED  1.400 <= 1.3  ")


def test_few_rows_have_no_gate_of_their_gemms():
    found = list(cpu_gates.verdicts(TIMES, rows=1023))
    assert [verdict.limit for verdict in found] == [None, 1.3, None, 1.0]
    assert str(found[0]).startswith("        1.050  ours")


@pytest.mark.skipif(not dispatch.availability("linear_kd_loss", "cpp")[0], reason="no C++")
def test_a_tiny_shape(capsys):
    sizes = ("--rows", "8", "--classes", "50", "--widths", "4/6", "--divergence", "jsd")
    ticks = itertools.count()
    assert cpu_gates.main([*sizes, "--rounds", "1", "--no-peers", "--cpu-time"]) in (0, 1)
    text = capsys.readouterr().out
    assert "N=8 D_s=4 D_t=6 V=50 jsd" in text
    for name in ("ours cpp of gemms x4", "ours cpp, bf16 of fp32", "frozen head of gemms x3"):
        assert name in text
    times = cpu_gates.measure({"a": lambda: None, "b": lambda: None}, 2, lambda: next(ticks))
    assert times == {"a": [1, 1], "b": [1, 1]}

"""`modxfer bench`: one real small run, and its messages."""

import json

import pytest
import torch

from benchmarks import bench_linear_kd_loss, harness, peers, results, shapes
from modxfer_fast.cli.main import main

SMALL = ["--device", "cpu", "--shape", "smoke", "--N", "16", "--V", "200", "--quick"]


def test_run_writes_rows_and_a_table(tmp_path, monkeypatch, uncompiled, capsys):
    monkeypatch.setattr(peers, "version", lambda package: None)
    files = {kind: tmp_path / f"r.{kind}" for kind in ("json", "csv")}
    options = [f"--{kind}={path}" for kind, path in files.items()]
    assert main(["bench", "linear_kd_loss", *SMALL, *options]) == 0
    environment, rows = results.read(files["json"])
    assert results.read(files["csv"]) == (environment, rows)
    assert environment["torch"] == torch.__version__
    assert {(row.N, row.D_s, row.D_t, row.V) for row in rows} == {(16, 32, 48, 200)}
    printed = capsys.readouterr().out
    assert all(row.impl in printed for row in rows)
    assert printed.count("not installed") >= 2


def test_several_divergences_of_a_room_without_widths(tmp_path, uncompiled):
    path = tmp_path / "r.json"
    options = ["--divergence", "jsd", "forward_kl", "--json", str(path)]
    assert main(["bench", "kd_loss", *SMALL, *options]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert {"ours reference", "eager", "copy of 5 N V"} <= {row["impl"] for row in rows}
    assert {row["divergence"] for row in rows} == {"jsd", "forward_kl"}
    assert {(row["D_s"], row["D_t"]) for row in rows} == {(None, None)}


def test_exit_code_tells_of_a_wrong_result_of_ours(monkeypatch):
    def lineup(case):
        zero = {"loss": torch.zeros(())}
        ours = harness.Candidate("ours cpp", lambda: zero, ("loss",), floor="floor")
        return harness.Lineup([ours], {"floor": lambda: None}, lambda: {"loss": torch.ones(())})

    monkeypatch.setattr(bench_linear_kd_loss, "lineup", lineup)
    assert main(["bench", "linear_kd_loss", *SMALL]) == 1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["lora"], ["room: expected one of kd_loss, linear_kd_loss", "'lora'"]),
        (["kd_loss", "--shape", "big"], ["shape: expected one of", "cpu-gate", "'big'"]),
        (["kd_loss", "--N", "0"], ["N: expected a positive integer, got 0"]),
        (["kd_loss", "--divergence", "kl"], ["divergence: expected one of forward_kl", "'kl'"]),
        (["kd_loss", "--beta", "2", "--divergence", "jsd"], ["beta: expected a number in [0, 1]"]),
        pytest.param(
            ["kd_loss", "--device", "cuda"],
            ["--device: torch sees no GPU here"],
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is present"),
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_arguments_name_the_valid_ones(arguments, expected, capsys):
    assert main(["bench", "--device", "cpu", "--quick", *arguments]) == 2
    message = capsys.readouterr().err
    assert all(part in message for part in expected), message


def test_every_device_has_a_default_shape():
    assert set(shapes.DEFAULT.values()) <= set(shapes.SHAPES)

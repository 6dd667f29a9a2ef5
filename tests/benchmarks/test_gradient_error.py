"""The table and the figure of gradient errors, at a small size, without peers or compiling."""

import csv

import pytest

from benchmarks import bench_linear_kd_loss, gradient_error


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    path = tmp_path_factory.mktemp("results") / "error"
    sizes = ["--N=32", "--D_s=32", "--D_t=32", "--V=500", "--deltas", "0.1", "1.0"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_linear_kd_loss, "_PEERS", {})
        gradient_error.main([*sizes, "--no-compile", "--output", str(path)])
    return path


def test_rows_are_what_the_theory_says(output):
    """bf16 logits cost accuracy as 1 / delta; logits that are not rounded cost none."""
    with output.with_suffix(".csv").open(newline="") as file:
        assert '"V": "500"' in file.readline()
        rows = list(csv.DictReader(file))
    assert {row["impl"] for row in rows} >= {"ours cpp", "ours reference", "eager"}
    assert {row["divergence"] for row in rows} == set(gradient_error.DIVERGENCES)
    half = [row for row in rows if row["dtype"] == "bfloat16"]
    for row in half:
        if row["impl"].startswith("ours"):
            assert float(row["dhidden"]) < 3e-3
            assert float(row["dweight"]) < 3e-3
    for divergence in gradient_error.DIVERGENCES:
        near, far = (
            float(row["dhidden"])
            for row in half
            if (row["impl"], row["divergence"]) == ("eager", divergence)
        )
        assert near > 4 * far > 20e-3
    assert all(float(row["dhidden"]) < 1e-4 for row in rows if row["dtype"] == "float32")


def test_the_figure_is_drawn(output):
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")

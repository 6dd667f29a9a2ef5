"""Files of rows, and the figures drawn from them."""

import dataclasses
import json

import pytest

from benchmarks import plot, results
from benchmarks.results import Row

ENVIRONMENT = {"cpu": "a, b", "torch": "2.13.0"}
KD = {"N": 8, "D_s": 4, "D_t": 6, "V": 30, "divergence": "jsd", "beta": 0.3}
ROWS = [
    Row("linear_kd_loss", "gemms x4", "cpu", "float32", KD, "floor", 2.0, 0.1, 2.0, 1.0),
    Row(
        room="linear_kd_loss",
        impl="ours cpp",
        device="cpu",
        dtype="float32",
        problem=KD,
        check="pass dhidden 1.0e-06 of 1e-04",
        time_ms=2.1,
        time_ms_iqr=0.2,
        floor_ms=2.0,
        ratio_to_floor=1.05,
        peak_mib=1.5,
        floor="gemms x4",
        flops=10**12,
        bytes=10**9,
        predicted_ms=1.9,
        saved_mib=0.25,
        launches=12,
        launches_of="op calls",
        host_ms=0.5,
        graph_ms=1.75,
    ),
    Row(
        "lora_linear",
        "peer",
        "cpu",
        "float32",
        {"M": 8, "N": "4+2", "targets": "qkv", "dropout": 0.1},
        "not installed",
    ),
]


@pytest.mark.parametrize(("write", "name"), [("write_json", "r.json"), ("write_csv", "r.csv")])
def test_files_bring_back_the_rows(tmp_path, write, name):
    path = tmp_path / "results" / name
    getattr(results, write)(path, ENVIRONMENT, ROWS)
    assert results.read(path) == (ENVIRONMENT, ROWS)


def test_json_schema(tmp_path):
    path = tmp_path / "r.json"
    results.write_json(path, ENVIRONMENT, ROWS)
    content = json.loads(path.read_text())
    assert set(content) == {"environment", "rows"}
    assert all(
        tuple(row) == results.columns([r]) for row, r in zip(content["rows"], ROWS, strict=True)
    )
    assert content["rows"][0]["divergence"] == "jsd"


def test_csv_has_a_column_for_every_size_of_its_rows(tmp_path):
    path = tmp_path / "r.csv"
    results.write_csv(path, ENVIRONMENT, ROWS)
    head = path.read_text().splitlines()[1].split(",")
    assert tuple(head) == results.columns(ROWS)
    assert head[:8] == ["room", "impl", "device", "dtype", "N", "D_s", "D_t", "V"]
    assert {"M", "targets", "dropout", "divergence", "beta"} <= set(head)


EARLIER = """\
# {"cpu": "a, b"}
room,impl,device,dtype,N,D_s,D_t,V,divergence,check,time_ms,time_ms_iqr,floor_ms,ratio_to_floor,peak_mib
kd_loss,ours cpp,cpu,float32,8,,,30,jsd,pass,2.0,0.1,1.0,2.0,0.5
"""


def test_files_of_before_the_roof_columns_are_read_and_drawn(tmp_path):
    path, figure = tmp_path / "r.csv", tmp_path / "r.png"
    path.write_text(EARLIER)
    _, (row,) = results.read(path)
    assert row.problem == {"N": 8, "V": 30, "divergence": "jsd"}
    assert (row.time_ms, row.peak_mib, row.predicted_ms) == (2.0, 0.5, None)
    plot.main([str(path), "--output", str(figure)])
    assert figure.exists()


def test_plot_is_drawn_from_a_file(tmp_path):
    path, figure = tmp_path / "r.csv", tmp_path / "plots" / "r.png"
    results.write_csv(path, ENVIRONMENT, ROWS)
    plot.main([str(path), "--output", str(figure)])
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_a_file_stays_whole_when_a_write_is_cut(tmp_path, monkeypatch):
    path = tmp_path / "r.csv"
    results.write_csv(path, ENVIRONMENT, ROWS[:1])
    before = path.read_text()

    def record(row):
        raise KeyboardInterrupt

    monkeypatch.setattr(results, "_record", record)
    with pytest.raises(KeyboardInterrupt):
        results.write_csv(path, ENVIRONMENT, ROWS)
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_plot_names_what_is_over_its_budget(tmp_path, monkeypatch):
    shown = []
    bars = plot._bars
    monkeypatch.setattr(
        plot, "_bars", lambda axes, rows, *rest: (bars(axes, rows, *rest), shown.append(axes))
    )
    off = dataclasses.replace(ROWS[1], check="over dhidden 2.0e-02 of 3e-03")
    plot.draw(ENVIRONMENT, [ROWS[1], off], tmp_path / "r.png")
    names = [label.get_text() for label in shown[0].get_yticklabels()]
    assert names == ["ours cpp", "ours cpp (over its error budget)"]


def test_plot_without_a_timed_row(tmp_path):
    with pytest.raises(ValueError, match="at least one timed row"):
        plot.draw(ENVIRONMENT, ROWS[2:], tmp_path / "r.png")

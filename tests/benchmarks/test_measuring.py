"""Clock, memory and files: what a figure in a table rests on."""

import dataclasses
import json
import time
from types import SimpleNamespace

import pytest
import torch

from benchmarks import counting, environment, memory, plot, results, roofline, timing
from benchmarks.results import Row
from modxfer_fast import linear_kd_loss

MIB = 2**20


def floats(mib):
    return torch.empty(mib * MIB // 4)


def test_peak_is_above_the_results():
    def step():
        scratch = floats(8)
        result = floats(3)
        del scratch
        return {"dweight": result}

    assert memory.peak_mib(step, "cpu") == pytest.approx(8, rel=0.01)


def test_peak_before_the_results_exist():
    def step():
        scratch = floats(8)
        del scratch
        return {"dweight": floats(3)}

    # eight are enough for a machine that must hold three in the end
    assert memory.peak_mib(step, "cpu") == pytest.approx(5, rel=0.01)


def test_peak_sees_inside_operators():
    a = torch.randn(256, 1024)

    def step():
        return {"loss": (a.exp() + a.cos()).sum()}  # exp, cos and their sum: 3 MiB at once

    assert memory.peak_mib(step, "cpu") == pytest.approx(3, rel=0.01)


def test_peak_is_no_smaller_for_freeing_what_existed_before():
    kept = [floats(16)]

    def step():
        kept.clear()
        return {"loss": floats(2).sum()}

    assert memory.peak_mib(step, "cpu") == pytest.approx(2, rel=0.01)


def test_peak_does_not_count_addresses_of_earlier_traces(monkeypatch):
    """torch's profiler remembers what was freed while nobody traced, and reports it freed later."""
    sizes = [(0xA, -16 * MIB), (0xB, 2 * MIB), (0xA, 3 * MIB), (0xB, -2 * MIB), (0xA, -3 * MIB)]
    events = [{"name": "[memory]", "args": {"Addr": a, "Bytes": b}} for a, b in sizes]
    monkeypatch.setattr(memory, "trace", lambda step, *args, **options: (events, step()))
    assert memory.peak_mib(dict, "cpu") == 5


def test_peak_counts_the_logits_that_are_kept_between_calls():
    n, v, d = 256, 2048, 16
    weight = torch.randn(v, d)

    def step():
        hidden = torch.randn(n, d)
        return {"loss": linear_kd_loss(hidden, weight, hidden, weight, backend="reference")}

    logits_mib = 2 * n * v * 4 / MIB
    assert [memory.peak_mib(step, "cpu") >= logits_mib for _ in range(2)] == [True, True]


def test_rounds_are_interleaved_and_rotated():
    calls = []
    steps = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    effort = timing.Effort(warmup_s=0.0, min_rounds=3, max_rounds=3, budget_s=0.0)
    timing.interleave(steps, "cpu", effort)
    assert "".join(calls[3:]) == "abcbcacab"


def test_median_and_spread():
    pauses = iter([0.0, 0.01, 0.02, 0.03, 0.04, 0.05])  # the first is the warm-up
    effort = timing.Effort(warmup_s=0.0, min_rounds=5, max_rounds=5, budget_s=0.0)
    timed = timing.interleave({"a": lambda: time.sleep(next(pauses))}, "cpu", effort)["a"]
    assert 29 < timed.median_ms < 60
    assert timing.iqr([10.0, 20.0, 30.0, 40.0, 50.0]) == 20.0
    assert timing.iqr([10.0]) == 0.0


class SimulatedGpu:
    """Time of a host that launches and of a device that works in order, in milliseconds.

    Stands for `torch.cuda` in `timing.CudaClock`.
    """

    CYCLES_PER_MS = 10**6

    def __init__(self, monkeypatch):
        self.host = self.device = 0.0
        for name, function in {
            "synchronize": self.synchronize,
            "_sleep": lambda cycles: self.launch(cycles / self.CYCLES_PER_MS),
            "Event": lambda enable_timing: SimulatedEvent(self),
            "get_device_properties": lambda index: SimpleNamespace(L2_cache_size=8),
        }.items():
            monkeypatch.setattr(torch.cuda, name, function)
        flush = SimpleNamespace(zero_=lambda: self.launch(0.01))
        monkeypatch.setattr(timing.torch, "empty", lambda *args, **options: flush)
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.host / 1e3)

    def launch(self, work_ms: float, host_ms: float = 0.005) -> None:
        self.host += host_ms
        self.device = max(self.device, self.host) + work_ms

    def synchronize(self) -> None:
        self.host = self.device = max(self.host, self.device)


class SimulatedEvent:
    def __init__(self, gpu: SimulatedGpu):
        self._gpu = gpu

    def record(self) -> None:
        self._gpu.launch(0.0)
        self._time = self._gpu.device

    def elapsed_time(self, end: "SimulatedEvent") -> float:
        return end._time - self._time


def test_times_of_a_gpu_are_without_pythons(monkeypatch):
    gpu = SimulatedGpu(monkeypatch)

    def launches_eight_kernels():
        for _ in range(8):
            gpu.launch(work_ms=0.05, host_ms=0.2)

    effort = timing.Effort(warmup_s=0.0, min_rounds=3, max_rounds=3)
    (timed,) = timing.interleave({"a": launches_eight_kernels}, "cuda", effort).values()
    assert timed.median_ms == pytest.approx(8 * 0.05)
    assert timed.host_ms == pytest.approx(8 * 0.2)


def test_a_step_that_waits_for_the_gpu_is_timed_as_it_is(monkeypatch):
    gpu = SimulatedGpu(monkeypatch)

    def waits():
        gpu.launch(work_ms=1.0)
        gpu.synchronize()
        gpu.launch(work_ms=1.0, host_ms=0.5)

    effort = timing.Effort(warmup_s=0.0, min_rounds=3, max_rounds=3)
    (timed,) = timing.interleave({"a": waits}, "cuda", effort).values()
    assert timed.median_ms == pytest.approx(2.5, rel=0.01)


def test_a_cpu_has_no_time_beside_its_own():
    (timed,) = timing.interleave({"a": lambda: None}, "cpu", timing.QUICK).values()
    assert timed.host_ms is None


def test_budget_ends_after_the_least_rounds():
    rounds = []
    effort = timing.Effort(warmup_s=0.0, min_rounds=2, max_rounds=50, budget_s=0.0)
    timing.interleave({"a": lambda: None}, "cpu", effort, rounds.append)
    assert rounds == [0, 1]


def test_saved_counts_each_storage_once_and_no_weight():
    weight = torch.randn(1024, 256, requires_grad=True)
    x = torch.randn(1024, 1024, requires_grad=True)  # 4 MiB

    def step():
        y = x @ weight  # keeps x and the weight
        (y.exp() * x[:, :256]).sum().backward()  # keeps exp(y), 1 MiB, and a view of x
        x.grad = weight.grad = None

    assert counting.saved_mib(step, [weight]) == 5.0
    assert counting.saved_mib(step, []) == 6.0


def test_saved_sees_what_our_op_keeps():
    n, d, v = 64, 32, 100
    hidden, weight = torch.randn(n, d, requires_grad=True), torch.randn(v, d)
    step = lambda: linear_kd_loss(hidden, weight, hidden.detach(), weight, backend="reference")
    assert counting.saved_mib(step, [weight]) * MIB == n * d * 4  # dhidden


def test_launches_are_outermost_calls():
    a, weight = torch.randn(8, 8), torch.randn(8, 8)
    step = lambda: torch.nn.functional.linear(a, weight).relu()  # linear calls t and mm
    assert counting.launches(step, "cpu") == 2
    kd = lambda: linear_kd_loss(a, weight, a, weight, backend="reference")
    assert 0 < counting.launches(kd, "cpu") < 20


def test_launches_of_a_compiled_function_are_unknown_on_a_cpu():
    a = torch.randn(8, 8)
    compiled = torch.compile(lambda x: x.exp() + 1, backend="eager")
    compiled(a)
    assert counting.launches(lambda: compiled(a), "cpu") is None


def test_roof_is_what_a_copy_and_a_product_reach():
    roof = roofline.measure_roof("cpu", torch.float32, copy_bytes=1 << 20, matmul_width=64)
    assert 1e8 < roof.bytes_per_s < 1e13
    assert 1e7 < roof.flops_per_s < 1e14
    assert set(roof.described()) == {"copy", "matmul"}


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


def test_the_commit_of_a_copy_without_git_is_told(monkeypatch):
    monkeypatch.setenv("MODXFER_COMMIT", "0123abc")
    assert environment.describe("cpu")["commit"] == "0123abc"


def test_plot_without_a_timed_row(tmp_path):
    with pytest.raises(ValueError, match="at least one timed row"):
        plot.draw(ENVIRONMENT, ROWS[2:], tmp_path / "r.png")

"""Errors of linear_kd_loss and its peers against fp64 as the student nears its teacher.

    python -m benchmarks.gradient_error --output benchmarks/results/cpu/gradient_error

A student's logits are its teacher's and `delta` times noise, of logits with standard deviation 3.
Its gradient is the difference of two distributions that are about delta apart, so that an error of
the logits which does not shrink with delta is one of the gradient that grows as 1 / delta. The
truth is fp64 from the same inputs, rounded to their dtype. Writes OUTPUT.csv and OUTPUT.png.
"""

import argparse
import csv
import dataclasses
import io
import json
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

import matplotlib
import torch

from benchmarks import bench_linear_kd_loss, harness, kd
from benchmarks.rooms import Case
from modxfer_fast import files
from modxfer_fast.measure import environment

matplotlib.use("Agg")
from matplotlib import pyplot as plt

DELTAS = (0.03, 0.1, 0.3, 1.0)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DIVERGENCES = ("forward_kl", "jsd")
SHAPE = kd.Shape(N=128, D_s=256, D_t=256, V=8000)
# by the beginning of a candidate's name
_COLOURS = {
    "ours cpp": "#1f6f8b",
    "ours reference": "#6fb3c8",
    "eager": "#c9a227",
    "torch.compile": "#8a6d1d",
    "liger": "#c0504d",
    "trl": "#7a7a7a",
}


@dataclasses.dataclass(frozen=True)
class Error:
    """Relative errors, |result - truth| / |truth|, of an implementation at one delta."""

    divergence: str
    dtype: str
    delta: float
    impl: str
    loss: float
    dhidden: float
    dweight: float


def errors(
    shape: kd.Shape, deltas: Sequence[float], compiles: bool, device: str = "cpu"
) -> Iterator[Error]:
    """Of every implementation with a trainable head that runs here."""
    for divergence in DIVERGENCES:
        for name, dtype in DTYPES.items():
            for delta in deltas:
                case = Case(shape, dtype, device, divergence, {"beta": 0.5, "delta": delta})
                lineup = bench_linear_kd_loss.lineup(case)
                truth = lineup.truth()
                for candidate in lineup.candidates:
                    is_compiled = candidate.name.startswith(("torch.compile", "liger"))
                    if candidate.step is None or candidate.outputs or is_compiled > compiles:
                        continue
                    found = candidate.step()
                    assert found is not None
                    of = {key: harness.relative_error(found[key], truth[key]) for key in truth}
                    yield Error(divergence, name, delta, candidate.name, **of)


def write(path: Path, described: dict[str, str], rows: Sequence[Error]) -> None:
    text = io.StringIO()
    text.write(f"# {json.dumps(described)}\n")
    fields = [field.name for field in dataclasses.fields(Error)]
    writer = csv.DictWriter(text, fields, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        values = dataclasses.asdict(row)
        writer.writerow({k: f"{v:.3g}" if isinstance(v, float) else v for k, v in values.items()})
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path, text.getvalue())


def draw(path: Path, described: dict[str, str], rows: Sequence[Error]) -> None:
    figure, axes = plt.subplots(
        len(DTYPES), len(DIVERGENCES), figsize=(10, 7), sharex=True, sharey="row", squeeze=False
    )
    for line, dtype in zip(axes, DTYPES, strict=True):
        for panel, divergence in zip(line, DIVERGENCES, strict=True):
            chosen = [row for row in rows if (row.dtype, row.divergence) == (dtype, divergence)]
            for impl in dict.fromkeys(row.impl for row in chosen):
                points = [(row.delta, row.dhidden) for row in chosen if row.impl == impl]
                colour = next((c for k, c in _COLOURS.items() if impl.startswith(k)), "black")
                panel.plot(
                    *zip(*points, strict=True),
                    marker="o",
                    markersize=4,
                    color=colour,
                    linestyle="-" if impl.startswith("ours") else "--",
                    label=impl,
                )
            panel.set_xscale("log")
            panel.set_yscale("log")
            panel.set_title(f"{divergence}, {dtype} heads", fontsize=9, loc="left")
            panel.grid(alpha=0.3)
            panel.tick_params(labelsize=7, which="both")
            panel.spines[["top", "right"]].set_visible(False)
        line[0].set_ylabel("relative error of dhidden", fontsize=8)
        line[-1].legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    for panel in axes[-1]:
        panel.set_xlabel("delta: standard deviation of student minus teacher logits", fontsize=8)
    figure.suptitle(textwrap.fill(environment.header(described), 130), fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=140)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gradient_error", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--output", type=Path, required=True, help="of files, without a suffix")
    for name, size in dataclasses.asdict(SHAPE).items():
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--deltas", type=float, nargs="+", default=DELTAS)
    parser.add_argument(
        "--no-compile", action="store_true", help="leave out what torch.compile makes"
    )
    args = parser.parse_args(argv)
    shape = kd.Shape(args.N, args.D_s, args.D_t, args.V)
    described = environment.describe("cpu")
    described |= {name: str(size) for name, size in dataclasses.asdict(shape).items()}
    rows = []
    for row in errors(shape, args.deltas, not args.no_compile):
        rows.append(row)
        print(
            f"{row.divergence:12}{row.dtype:10}{row.delta:6}  {row.impl:24}loss {row.loss:8.1e}  "
            f"dhidden {row.dhidden:8.1e}  dweight {row.dweight:8.1e}",
            flush=True,
        )
        write(args.output.with_suffix(".csv"), described, rows)
    draw(args.output.with_suffix(".png"), described, rows)


if __name__ == "__main__":
    main()

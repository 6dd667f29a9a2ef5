"""What linear_kd_loss reads, writes, computes and launches, step by step, and the time it allows.

python -m benchmarks.roofline

A step is a kernel: it takes as long as its bytes at the rate of memory or its FLOPs at that of the
products, whichever is longer, and steps run one after another. What no model of this kind sees:
waves of tiles that do not fill the machine, an epilogue that does not hide, the time of a launch.
The chunks are those that the loop itself would plan.
"""

from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.kd import ROOM, Shape
from modxfer_fast.kernels.common.chunks import ChunkPlan, spans
from modxfer_fast.kernels.common.head import Head
from modxfer_fast.kernels.divergences import DIVERGENCES
from modxfer_fast.kernels.linear_kd_loss.stream import plan_of
from modxfer_fast.measure.claimed import OnGPU
from modxfer_fast.measure.roofline import Roof, Work

DOCS = Path(__file__).parents[1] / "docs" / "kernels"
_PRODUCTS, _COPIES = 0.77, 0.875  # of what a vendor promises: what an H200 has been seen to keep up


def _of_vendor(terabytes_per_s: float, dense_bf16_tflops: float) -> Roof:
    return Roof(_COPIES * terabytes_per_s * 1e12, _PRODUCTS * dense_bf16_tflops * 1e12)


ROOFS: Mapping[str, Roof] = {
    "H100": _of_vendor(3.35, 989),
    "H200": _of_vendor(4.8, 989),
    "B200": _of_vendor(8.0, 2250),
    "MI300X": _of_vendor(5.3, 1307),
}


class Step(NamedTuple):
    """A kernel of the loop, by what it is for."""

    name: str
    work: Work


def heads(shape: Shape, dtype: torch.dtype, device: str) -> tuple[Head, Head]:
    """Student and teacher without values, on a device that need not be there."""

    def make(*size: int) -> torch.Tensor:
        if device == "cuda":
            return OnGPU.make(*size, dtype=dtype)
        return torch.empty(size, dtype=dtype, device="meta")

    return tuple(
        Head(make(shape.N, width), make(shape.V, width)) for width in (shape.D_s, shape.D_t)
    )


class _ChunkByChunk(Head):
    def slab_rows(self, rows: int, wanted: Set[str], dtype: torch.dtype) -> int:
        return 0


def plan(
    shape: Shape,
    dtype: torch.dtype,
    device: str,
    *,
    frozen: bool = False,
    workspace_mb: int | None = None,
    slabs: bool = True,
) -> ChunkPlan:
    """The chunks and slabs of a call without labels.

    Args:
        slabs: False for gradients chunk after chunk, with dlogits over the logits.
    """
    wide = torch.promote_types(dtype, torch.float32)
    student, teacher = heads(shape, dtype, device)
    if not slabs:
        student = _ChunkByChunk(*student)
    workspace_bytes = None if workspace_mb is None else workspace_mb * 2**20
    return plan_of(student, teacher, shape.N, wanted(frozen), wide, workspace_bytes)


def wanted(frozen: bool) -> set[str]:
    return {"hidden"} if frozen else {"hidden", "weight"}


def steps(
    shape: Shape,
    dtype: torch.dtype,
    device: str,
    divergence: str,
    of: ChunkPlan,
    *,
    frozen: bool = False,
) -> Iterator[Step]:
    """The kernels of one forward and backward with an upstream gradient of 1.

    On a GPU a row kernel reads both rows of logits in each of its passes; on a CPU they stay in a
    cache, and half-precision weights are widened tile by tile, which reads and writes them.
    """
    n, d_s, d_t, v = shape.N, shape.D_s, shape.D_t, shape.V
    b, wide = dtype.itemsize, max(dtype.itemsize, 4)
    on_gpu, is_half = device == "cuda", dtype.itemsize < 4
    widens = is_half and not on_gpu
    normalised = DIVERGENCES[divergence].row_sums == "normalised"
    passes = (3 if normalised else 2) if on_gpu else 1
    of_dz = wide if widens else b

    def product(name: str, m: int, k: int, n: int, bytes_: int) -> Step:
        return Step(name, Work(2 * m * k * n, bytes_))

    def weight(width: int) -> int:
        """Bytes of reading it for a product, widened on the way where it is."""
        return (b + 2 * wide if widens else b) * v * width

    yield from [Step("fill", Work(0, n * wide))] * 3  # kd, ce and z-loss of rows
    for number, slab in enumerate(spans(n, of.slab or of.rows)):
        rows = slab.stop - slab.start
        for chunk in spans(rows, of.rows):
            m = chunk.stop - chunk.start
            for name, width in (("z_s", d_s), ("z_t", d_t)):
                yield product(name, m, width, v, b * m * width + weight(width) + wide * m * v)
            yield Step("rows", Work(0, (2 * passes * wide + of_dz) * m * v))
            yield from [Step("copy", Work(0, 2 * m * wide))] * 2
        yield product("dhidden", rows, v, d_s, of_dz * rows * v + weight(d_s) + b * rows * d_s)
        if not frozen:
            rounds = of.is_single and on_gpu
            written = b if rounds or not is_half else wide
            moved = (2 if number else 1) * written * v * d_s
            yield product("dweight", v, rows, d_s, of_dz * rows * v + b * rows * d_s + moved)
    if is_half and not frozen and not (of.is_single and on_gpu):
        yield Step("round", Work(0, (wide + b) * v * d_s))
    if on_gpu:
        yield from [Step("scale", Work(0, 0))] * (1 if frozen else 2)


def floor_ms(shape: Shape, roof: Roof, *, frozen: bool = False) -> float:
    """Of its bare products in bf16, from and to bf16."""
    n, v = shape.N, shape.V
    widths = [shape.D_s, shape.D_t, shape.D_s, *([] if frozen else [shape.D_s])]
    return sum(
        roof.predicted_ms(Work(2 * n * v * width, 2 * (n * width + v * width + n * v)))
        for width in widths
    )


class Prediction(NamedTuple):
    """Of one plan on one machine; predicted, not measured."""

    plan: ChunkPlan
    gigabytes: float
    launches: int
    ms: float
    floor_ms: float
    peak_mib: float


def predict(
    shape: Shape,
    machine: str,
    divergence: str = "forward_kl",
    *,
    frozen: bool = False,
    **options,
) -> Prediction:
    """bf16 on a GPU; options are those of `plan`."""
    bf16, roof = torch.bfloat16, ROOFS[machine]
    of = plan(shape, bf16, "cuda", frozen=frozen, **options)
    found = list(steps(shape, bf16, "cuda", divergence, of, frozen=frozen))
    sums = 0 if frozen or of.is_single else 4 * shape.V * shape.D_s
    return Prediction(
        of,
        sum(step.work.bytes for step in found) / 1e9,
        len(found),
        roof.predicted_ms(*(step.work for step in found)),
        floor_ms(shape, roof, frozen=frozen),
        (8 * of.rows * shape.V + 2 * of.slab * shape.V + sums) / 2**20,
    )


_SELF = Shape(8192, 4096, 4096, 128256)
GATES = {  # those of benchmarks/gates.py
    "4096/4096": (_SELF, {}),
    "4096/4096, jsd": (_SELF, {"divergence": "jsd"}),
    "4096/4096, frozen head": (_SELF, {"frozen": True}),
    "4096/4096, N=1024": (Shape(1024, 4096, 4096, 128256), {}),
    "2048/4096": (ROOM.shapes["llama3-1b-from-8b"], {}),
    "2048/4096, frozen head": (ROOM.shapes["llama3-1b-from-8b"], {"frozen": True}),
}


def table() -> str:
    """The predictions of docs/kernels/linear_kd_loss.md, in Markdown."""
    lines = [
        "| D_s/D_t | | chunk, slab | GB | launches | H200 ms | of GEMMs | H100 | B200 | MI300X "
        "| MiB |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    plans = {"512 MiB, no slab": {"workspace_mb": 512, "slabs": False}, "default": {}}
    for name, (shape, options) in GATES.items():
        for label, of in plans.items():
            p = predict(shape, "H200", **options, **of)
            others = " | ".join(
                f"{predict(shape, machine, **options, **of).ms:.1f}"
                for machine in ("H100", "B200", "MI300X")
            )
            lines.append(
                f"| {name} | {label} | {p.plan.rows}, {p.plan.slab or '-'} | {p.gigabytes:.0f} "
                f"| {p.launches} | {p.ms:.1f} | {p.ms / p.floor_ms:.2f} | {others} "
                f"| {p.peak_mib:.0f} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())

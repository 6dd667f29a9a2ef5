"""Partial sums added in a fixed order."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit
def _reduce_kernel(
    part_ptrs,                           # in   [count, size], fp32; each
    out_ptrs,                            # out  [size] each
    counts, sizes,
    JOBS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    first = 0
    for j in tl.static_range(JOBS):
        blocks = tl.cdiv(sizes[j], BLOCK)
        if (pid >= first) & (pid < first + blocks):
            offs = (pid - first).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
            mask = offs < sizes[j]
            total = tl.zeros([BLOCK], tl.float32)
            # unrolled: loads of several partials are under way at once, sums stay in order
            for part in tl.range(0, counts[j], loop_unroll_factor=4):
                row = tl.full([], 0, tl.int64) + part
                total += tl.load(part_ptrs[j] + row * sizes[j] + offs, mask=mask, other=0.0)
            tl.store(out_ptrs[j] + offs, total.to(out_ptrs[j].dtype.element_ty), mask=mask)
        first += blocks


def reduce(parts: Sequence[Tensor | None], outs: Sequence[Tensor | None]) -> None:
    """outs[i] = parts[i].sum(0), rounded once; None is left alone."""
    jobs = [
        (part, out)
        for part, out in zip(parts, outs, strict=True)
        if part is not None and out is not None and out.numel() > 0
    ]
    if not jobs:
        return
    sizes = tuple(out.numel() for _, out in jobs)
    with torch.cuda.device_of(jobs[0][1]):
        _reduce_kernel[(sum(triton.cdiv(size, _BLOCK) for size in sizes),)](
            tuple(part for part, _ in jobs),
            tuple(out for _, out in jobs),
            counts=tuple(part.shape[0] for part, _ in jobs),
            sizes=sizes,
            JOBS=len(jobs),
            BLOCK=_BLOCK,
            num_warps=4,
            enable_fp_fusion=True,
        )

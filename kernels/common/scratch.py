"""Memory for what a loop over chunks has in flight, kept from one call to the next on a CPU."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

# A fresh quarter of a gigabyte costs a CPU 64,000 page faults, 5 % of the GEMMs it serves. On a GPU
# the caching allocator keeps such memory; here one buffer waits for the next call.
_spare: list[Tensor] = []

# Rows begin at multiples of so many elements. Those of an odd vocabulary (50257) would be aligned
# to 4 bytes, and cuBLAS would pass over its kernels that load vectors.
_PITCH = 64


def release_workspace() -> None:
    """Frees the buffer that a CPU keeps between two calls of a streamed loss."""
    _spare.clear()


@contextlib.contextmanager
def scratch(numel: int, dtype: torch.dtype, device: torch.device) -> Iterator[Tensor]:
    """An uninitialised [numel] buffer; not to be kept after the block."""
    on_cpu, buffer = device.type == "cpu", None
    if on_cpu:
        with contextlib.suppress(IndexError):
            buffer = _spare.pop()
    if buffer is None or buffer.dtype != dtype or buffer.numel() < numel:
        with torch.inference_mode(False):  # the buffer may outlive an inference that came first
            buffer = torch.empty(numel, dtype=dtype, device=device)
    yield buffer[:numel]
    if on_cpu and not _spare:
        _spare.append(buffer)


@contextlib.contextmanager
def logits_buffers(
    rows: int, vocab_size: int, dtype: torch.dtype, device: torch.device, count: int = 2
) -> Iterator[tuple[Tensor, ...]]:
    """`count` buffers [rows, vocab_size] in a `scratch`, with rows `pitch(vocab_size)` apart."""
    width = pitch(vocab_size)
    with scratch(count * rows * width, dtype, device) as buffer:
        yield buffer.view(count, rows, width)[:, :, :vocab_size].unbind()


@contextlib.contextmanager
def slab_buffer(
    rows: int, vocab_size: int, dtype: torch.dtype, device: torch.device
) -> Iterator[Tensor | None]:
    """[rows, vocab_size], rows as far apart as those of `logits_buffers`; None for no rows."""
    yield (
        torch.empty(rows, pitch(vocab_size), dtype=dtype, device=device)[:, :vocab_size]
        if rows
        else None
    )


def pitch(vocab_size: int) -> int:
    """Elements from one row of `logits_buffers` to the next."""
    return -(-vocab_size // _PITCH) * _PITCH

"""Memory for what a loop over chunks has in flight, kept from one call to the next on a CPU."""

import contextlib

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


class scratch:
    """An uninitialised [numel] buffer; not to be kept after the block."""

    def __init__(self, numel: int, dtype: torch.dtype, device: torch.device):
        self._numel, self._dtype, self._device = numel, dtype, device

    def __enter__(self) -> Tensor:
        buffer = None
        if self._device.type == "cpu":
            with contextlib.suppress(IndexError):
                buffer = _spare.pop()
        if buffer is None or buffer.dtype != self._dtype or buffer.numel() < self._numel:
            with torch.inference_mode(False):  # the buffer may outlive an inference that came first
                buffer = torch.empty(self._numel, dtype=self._dtype, device=self._device)
        self._buffer = buffer
        return buffer[: self._numel]

    def __exit__(self, error: type | None, *_: object) -> None:
        buffer, self._buffer = self._buffer, None
        if error is None and self._device.type == "cpu" and not _spare:
            _spare.append(buffer)


class logits_buffers(scratch):
    """Two uninitialised [rows, vocab_size] buffers with rows `pitch(vocab_size)` apart.

    Not to be kept after the block.
    """

    def __init__(self, rows: int, vocab_size: int, dtype: torch.dtype, device: torch.device):
        self._shape = rows, vocab_size, pitch(vocab_size)
        super().__init__(2 * rows * self._shape[2], dtype, device)

    def __enter__(self) -> tuple[Tensor, Tensor]:
        rows, vocab_size, width = self._shape
        return super().__enter__().view(2, rows, width)[:, :, :vocab_size].unbind()


def pitch(vocab_size: int) -> int:
    """Elements from one row of `logits_buffers` to the next."""
    return -(-vocab_size // _PITCH) * _PITCH

"""Problem sizes: what every room's sizes share, and the named sizes of the two KD rooms."""

import dataclasses
from dataclasses import dataclass


class Sizes:
    """Base of frozen dataclasses of positive integers, named by dimension."""

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            if value < 1:
                raise ValueError(f"{name}: expected a positive integer, got {value}")

    @classmethod
    def names(cls) -> list[str]:
        return [field.name for field in dataclasses.fields(cls)]


@dataclass(frozen=True)
class Shape(Sizes):
    """N rows (tokens), D_s and D_t hidden widths, V classes."""

    N: int
    D_s: int
    D_t: int
    V: int


SHAPES = {
    "smoke": Shape(64, 32, 48, 1000),
    # the size of the CPU numbers in README: seconds on two cores, and the logits pass any cache
    "cpu-gate": Shape(1024, 512, 1024, 32000),
    "llama3-8b-self": Shape(8192, 4096, 4096, 128256),
    "llama3-8b-self-4k": Shape(4096, 4096, 4096, 128256),
    "llama3-1b-from-8b": Shape(8192, 2048, 4096, 128256),
    "llama3-1b-from-8b-16k": Shape(16384, 2048, 4096, 128256),
    "qwen3-0.6b-from-8b": Shape(8192, 1024, 4096, 151936),
    "qwen3-1.7b-from-32b": Shape(8192, 2048, 5120, 151936),
    "qwen3-0.6b-self": Shape(8192, 1024, 1024, 151936),
    "gemma2-2b-from-9b": Shape(8192, 2304, 3584, 256000),
}
DEFAULT = {"cpu": "cpu-gate", "cuda": "llama3-1b-from-8b"}

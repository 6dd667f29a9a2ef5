"""The instruction sets that csrc is compiled for, and the one its kernels run with.

A processor has some of them. Results of one set are the same bits in every run; those of two sets
differ by roundings.

Every function needs the compiled library: `compiled.available()` comes first.
"""

import contextlib
from collections.abc import Iterator

import torch

NAMES = ("baseline", "avx2", "avx512")  # in the order of csrc/include/modxfer/isa.h


def of_this_processor() -> tuple[str, ...]:
    """Narrowest first; the last is in use unless another was chosen."""
    has = torch.ops.modxfer_csrc.has_instruction_set
    return tuple(name for index, name in enumerate(NAMES) if has(index))


def in_use() -> str:
    return NAMES[torch.ops.modxfer_csrc.instruction_set()]


def use(name: str, argument: str = "name") -> None:
    """Every later call of a C++ kernel runs with this set. Not while one runs.

    Args:
        argument: what an error calls `name`.
    Raises:
        ValueError: not a set of this processor.
    """
    known = of_this_processor()
    if name not in known:
        raise ValueError(
            f"{argument}: expected an instruction set of this processor, one of "
            f"{', '.join(known)}, got {name!r}"
        )
    torch.ops.modxfer_csrc.use_instruction_set(NAMES.index(name))


@contextlib.contextmanager
def using(name: str) -> Iterator[None]:
    """`use(name)` inside, what was in use before afterwards."""
    before = in_use()
    use(name)
    try:
        yield
    finally:
        use(before)

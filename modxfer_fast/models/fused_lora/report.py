"""What `patch_peft_model` did, and how to undo it."""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class FusedLoraReport:
    """Printed, it names every LoRA layer once; numbered layers alike are one line.

    Usable as a context manager that undoes the patch at its end.

    Attributes:
        groups: names of layers computed together, a tuple a group.
        singles: names of layers computed by one op each: those of `apart`, and those beside which
            no layer is known that reads the same input.
        branches: names of layers whose base computes itself, and whose LoRA part is the op.
        apart: (names, reason) of layers that share an input and are nevertheless computed singly.
        declined: (name, reason) of layers that PEFT's own forward runs at present.
        already_patched: the call found nothing to change.
    """

    groups: tuple[tuple[str, ...], ...] = ()
    singles: tuple[str, ...] = ()
    branches: tuple[str, ...] = ()
    apart: tuple[tuple[tuple[str, ...], str], ...] = ()
    declined: tuple[tuple[str, str], ...] = ()
    already_patched: bool = False
    _undo: list[Callable[[], None]] = field(default_factory=list, repr=False, compare=False)

    @property
    def num_layers(self) -> int:
        return self.num_fused + len(self.declined)

    @property
    def num_fused(self) -> int:
        return sum(map(len, self.groups)) + len(self.singles) + len(self.branches)

    def unpatch(self) -> None:
        """Give the model back what this call changed; a second time does nothing."""
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> "FusedLoraReport":
        return self

    def __exit__(self, *exception) -> None:
        self.unpatch()

    def __getstate__(self) -> dict:
        # a copy in another process tells what was done, and has no model to undo it on
        return {**self.__dict__, "_undo": []}

    def __str__(self) -> str:
        state = ", was patched already" if self.already_patched else ""
        lines = [f"fused LoRA: {self.num_fused} of {self.num_layers} layers{state}"]
        lines += _counted("together", (_joined(group) for group in self.groups))
        known = {name for names, _ in self.apart for name in names}
        singles = [name for name in self.singles if name not in known]
        lines += _counted("alone, no other layer is known to read its input", singles)
        lines += _counted("LoRA part alone", self.branches)
        lines += _counted("not together", (f"{_joined(g)}: {reason}" for g, reason in self.apart))
        lines += _counted("left to PEFT", (f"{name}: {reason}" for name, reason in self.declined))
        return "\n".join(lines)


def _joined(group: tuple[str, ...]) -> str:
    parent = group[0].rpartition(".")[0]
    names = " + ".join(name.rpartition(".")[2] for name in group)
    return f"{parent}.({names})" if parent else f"({names})"


def _counted(title: str, lines) -> list[str]:
    """One line for all that differ by a layer number alone, with their count."""
    counts = Counter(re.sub(r"(?<=\.)\d+(?=\.)", "*", line) for line in lines)
    return [f"  {title}: {line}" + f" x {n}" * (n > 1) for line, n in counts.items()]

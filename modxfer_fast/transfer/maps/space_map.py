"""Linear maps between a space of the teacher and the same space of the student.

For row features s [d_s] of the student and t [d_t] of the teacher:

    t is about (s - mean_s) @ read + mean_t          where a module reads
    a change y of t becomes the change y @ write     where a module writes

so a linear update B A of the teacher becomes (write^T B) (A read^T) in the student. The paper's
selection matrix Z [d_s, d_t] is read = Z, write = Z^T.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from modxfer_fast.transfer.artefact import read_artefact, write_artefact
from modxfer_fast.transfer.errors import TransferError

KIND = "maps"
_PARTS = ("read", "write", "mean_s", "mean_t")
Key = tuple[str, int, int]  # space, student layer, teacher layer
Fitted = tuple[Tensor, Tensor, dict[str, float]]  # read, write and numbers of the fit


@dataclass(frozen=True)
class SpaceMap:
    """The map of one space of one pair of layers; fp64.

    Attributes:
        read: [d_s, d_t].
        write: [d_t, d_s].
        mean_s, mean_t: [d_s], [d_t]; zeros where means are not carried.
        fit: how well it fits, see scores.py; `tokens`, and what the method adds (`ridge_read`).
    """

    read: Tensor
    write: Tensor
    mean_s: Tensor
    mean_t: Tensor
    fit: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self):
        d_s, d_t = self.read.shape
        shapes = {"write": (d_t, d_s), "mean_s": (d_s,), "mean_t": (d_t,)}
        for name, expected in shapes.items():
            shape = tuple(getattr(self, name).shape)
            if shape != expected:
                raise TransferError(
                    f"{name}: expected {list(expected)} beside read {[d_s, d_t]}, got {list(shape)}"
                )

    @property
    def offset(self) -> Tensor:
        """mean_t - mean_s @ read [d_t]: what a constant term of the reading side absorbs."""
        return self.mean_t - self.mean_s @ self.read

    def read_weight(self, weight: Tensor) -> Tensor:
        """weight @ read^T [k, d_s] of a weight [k, d_t] that reads this space."""
        return weight.double() @ self.read.T

    def write_weight(self, weight: Tensor) -> Tensor:
        """write^T @ weight [d_s, k] of a weight [d_t, k] that writes it; also for a bias [d_t]."""
        return self.write.T @ weight.double()


class Maps(dict[Key, SpaceMap]):
    """All maps that were fitted together, by (space, student layer, teacher layer).

    Attributes:
        method: that fitted them.
        options: the choices, as written beside an adapter.
        facts: where they come from (models, tokens, seed).
    """

    def __init__(
        self,
        maps: Mapping[Key, SpaceMap],
        method: str,
        *,
        options: Mapping | None = None,
        facts: Mapping | None = None,
    ):
        super().__init__(maps)
        self.method = method
        self.options = dict(options or {})
        self.facts = dict(facts or {})

    def __missing__(self, key: Key) -> SpaceMap:
        space, s, t = key
        there = ", ".join(sorted({name for name, _, _ in self}))
        pairs = sorted({(a, b) for name, a, b in self if name == space})
        raise TransferError(
            f"maps: expected one for the space {space!r} of student layer {s} and teacher "
            f"layer {t}; there are maps for the spaces {there}"
            + (f", for {space!r} of the layers {pairs}" if pairs else "")
        )

    def fits(self) -> list[dict]:
        """One row per map: space, student, teacher and its fit scores."""
        return [
            {"space": space, "student": s, "teacher": t, **entry.fit}
            for (space, s, t), entry in self.items()
        ]

    def state_dict(self) -> dict[str, Tensor]:
        """`<space>.<student layer>.<teacher layer>.<name>` -> tensor, fp64."""
        # one tensor may serve several maps, which a file does not allow
        return {
            f"{space}.{s}.{t}.{name}": getattr(entry, name).clone(
                memory_format=torch.contiguous_format
            )
            for (space, s, t), entry in self.items()
            for name in _PARTS
        }

    def save(self, folder: str | Path, *, checksums: bool = True) -> None:
        """Write an artefact folder; see `artefact.write_artefact`."""
        facts = {
            "method": self.method,
            "options": self.options,
            "facts": self.facts,
            "fits": self.fits(),
        }
        write_artefact(folder, KIND, self.state_dict(), facts, checksums=checksums)

    @classmethod
    def load(cls, folder: str | Path, *, checksums: bool = True) -> "Maps":
        """Read what `save` wrote.

        Raises:
            TransferError: a missing or corrupt file.
        """
        tensors, facts = read_artefact(folder, KIND, checksums=checksums)
        maps = {}
        for row in facts["fits"]:
            key = row.pop("space"), row.pop("student"), row.pop("teacher")
            name = ".".join(map(str, key))
            parts = {part: tensors[f"{name}.{part}"] for part in _PARTS}
            maps[key] = SpaceMap(**parts, fit=row)
        return cls(maps, facts["method"], options=facts["options"], facts=facts["facts"])

"""What transfer asks of a type of PEFT module; every type answers in a file of its own."""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any, ClassVar, NamedTuple

from peft import PeftConfig
from torch import Tensor

from modxfer_fast.models.architecture import ROLES, Architecture, Role
from modxfer_fast.transfer.errors import TransferError
from modxfer_fast.transfer.maps.space_map import SpaceMap
from modxfer_fast.transfer.moments import Moments


class Slot(NamedTuple):
    """A block and a named place in it."""

    layer: int
    place: str


class Place(NamedTuple):
    """A module of every block that tensors can sit in: its path in a block and its spaces."""

    path: str
    role: Role


class Source(NamedTuple):
    """What one teacher layer contributes to a slot of the student.

    Attributes:
        tensors: of the teacher's slot, without the prefix of their kind.
        read, write: the maps of the spaces that the slot reads and writes.
        weight: of this layer among those that are combined.
        scaling: of a LoRA, else 1.
        moments: of the space it reads, student as x; None without statistics.
    """

    tensors: Mapping[str, Tensor]
    read: SpaceMap
    write: SpaceMap
    weight: float
    scaling: float = 1.0
    moments: Moments | None = None


Slots = Mapping[Slot, Mapping[str, Tensor]]
Scaling = Mapping[Slot, float]


class PeftKind(ABC):
    """A type of PEFT module that can be moved; it has no state.

    Attributes:
        name: PEFT's name of the type in lower case; PEFT's parameters of it begin with `<name>_`.
        tensors: regular expression for names of its tensors below the module they sit in.
        prefix: what those names begin with and `rewrite` leaves out.
        is_low_rank: whether it adds scaling B A x, with a rank to choose, to what a linear writes.
    """

    name: ClassVar[str]
    tensors: ClassVar[str]
    prefix: ClassVar[str] = ""
    is_low_rank: ClassVar[bool] = False

    def __str__(self) -> str:
        return self.name

    def check(self, config: PeftConfig) -> None:
        """Raise a TransferError where no map can move what the configuration asks for."""
        return None

    def places(self, config: PeftConfig, architecture: Architecture) -> Mapping[str, Place]:
        """The places that a module of this configuration can have in each block: its linears."""
        return {role: Place(path, ROLES[role]) for role, path in architecture.modules.items()}

    def slot(self, config: PeftConfig, architecture: Architecture, module: str) -> Slot | None:
        """The slot of a module by its dotted name, PEFT's prefixes allowed; None for no place."""
        found = architecture.in_block(module)
        for name, place in self.places(config, architecture).items():
            if found is not None and found[1] == place.path:
                return Slot(found[0], name)
        return None

    def module_name(self, config: PeftConfig, architecture: Architecture, slot: Slot) -> str:
        """Dotted name of the module that a slot's tensors sit in; it must be there."""
        there = self.places(config, architecture)
        if slot.place not in there:
            raise TransferError(
                f"{slot.place}: a {architecture.family} block has no such place for a {self} "
                f"module; it has {', '.join(there)}"
            )
        return f"{architecture.layers}.{slot.layer}.{there[slot.place].path}"

    def spaces(self, role: Role, tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
        """The spaces that maps are needed for: first the one it reads, last the one it writes."""
        return tuple(role)

    def takes_means(self, config: PeftConfig) -> bool:
        """Whether biases can take the constants that means add."""
        return True

    def scaling(self, config: PeftConfig, module: str, tensors: Mapping[str, Tensor]) -> float:
        """What an update is multiplied by; `module` is a dotted name in the model without PEFT."""
        return 1.0

    @abstractmethod
    def rewrite(self, sources: Sequence[Source], combine: str, **options: Any) -> dict[str, Tensor]:
        """The tensors of a student's slot, fp64, without the prefix.

        Args:
            combine: what becomes of several sources, one of `layer_maps.COMBINE`.
            options: rank, on_features and seed, which count for a low rank: see `LoRA.rewrite`.

        Raises:
            TransferError: sources that cannot be combined, or moments that are missing.
        """

    def factored(
        self, config: PeftConfig, slots: Slots
    ) -> tuple[Slots, Mapping[Slot, Mapping[str, float]]]:
        """All slots of `rewrite` together as PEFT saves them, and what fitting them left over."""
        return slots, {}

    def update(self, source: Source) -> tuple[Tensor, Tensor | None] | None:
        """Matrices B [d_t, n] and A [n, m], None for the identity, whose product the write map
        carries over, fp64; None of a kind that only scales features."""
        return None

    def student_config(
        self, config: PeftConfig, student: Architecture, slots: Slots, scaling: Scaling
    ) -> PeftConfig:
        """A copy of the teacher's configuration with the student's names, widths and layers.

        Args:
            slots: of the student, with tensors of their ranks and bottlenecks under PEFT's names.
        """
        config = deepcopy(config)
        config.base_model_name_or_path = config.revision = config.auto_mapping = None
        config.inference_mode = False
        config.modules_to_save = None
        config.layers_to_transform = None
        config.exclude_modules = None
        config.target_modules = self.targets(config, student, list(slots))
        self.set_sizes(config, student, slots, scaling)
        return config

    @abstractmethod
    def set_sizes(
        self, config: PeftConfig, student: Architecture, slots: Slots, scaling: Scaling
    ) -> None:
        """Writes into a configuration what it says about the tensors of these slots."""

    def targets(
        self, config: PeftConfig, student: Architecture, slots: Sequence[Slot]
    ) -> list[str] | str | None:
        """`target_modules` for just these slots: a regular expression of whole names."""
        names: dict[tuple[int, ...], list[str]] = {}
        layers: dict[str, list[int]] = {}
        places = self.places(config, student)
        for slot in sorted(slots):
            layers.setdefault(places[slot.place].path, []).append(slot.layer)
        for path, indices in layers.items():
            names.setdefault(tuple(indices), []).append(re.escape(path))
        blocks = re.escape(student.layers.rpartition(".")[2])
        parts = [
            rf"{blocks}\.({'|'.join(map(str, indices))})\.({'|'.join(paths)})"
            for indices, paths in names.items()
        ]
        return rf"(.*\.)?({'|'.join(parts)})"


def weighted_sum(weights: Sequence[float], tensors: Sequence[Tensor]) -> Tensor:
    """Of several sources; a single one with weight 1 stays bit-equal."""
    total = weights[0] * tensors[0]
    for weight, tensor in zip(weights[1:], tensors[1:], strict=True):
        total = total + weight * tensor
    return total


def places_of_every_block(slots: Sequence[Slot], student: Architecture) -> list[str] | None:
    """The places of slots that are the same in every block; None where blocks differ."""
    chosen = list(dict.fromkeys(slot.place for slot in sorted(slots)))
    return chosen if len(slots) == len(chosen) * student.num_layers else None

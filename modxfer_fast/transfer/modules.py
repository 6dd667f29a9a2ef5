"""A trained PEFT module as tensors with known places, apart from the model it was trained in.

Every tensor belongs to a slot: a block and a named place in it. The place says which spaces the
tensor reads and writes, which is all that transport needs to know about PEFT.

kind         place                         tensors
lora         role of the linear            lora_A.weight [r, d_in], lora_B.weight [d_out, r],
                                           lora_B.bias [d_out] with lora_bias
ia3          role of the linear            ia3_l, [d_out, 1], or [1, d_in] for a feed-forward one
bottleneck   attention, ffn                bottleneck_{down,up}.{weight,bias}
compacter    attention, ffn                compacter_{down,up}.{left,right,bias}, compacter_rule or
                                           compacter_{down,up}.rule
"""

import re
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from modxfer_fast.models.architecture import Architecture, Role, without_peft
from modxfer_fast.models.checks import listed
from modxfer_fast.models.task import label_names, same_labels
from modxfer_fast.transfer.errors import TransferError, check_choice
from modxfer_fast.transfer.kinds import PeftKind, Slot, Slots, kind_of

Content = TypeVar("Content")
PREFIX = "base_model.model."
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class PeftModuleState:
    """One trained module.

    Attributes:
        config: of PEFT, as it was trained or as the student is to load it.
        architecture: of the model the module belongs to.
        slots: tensors of each slot by their names in the table above.
        head: tensors of modules that were trained beside it, e.g. "classifier.weight".
        facts: how it came about, as written beside an adapter.
        labels: what the classes of the head are, in their order; none where no model said it.
    """

    config: PeftConfig
    architecture: Architecture
    slots: Slots
    head: Mapping[str, Tensor] = field(default_factory=dict)
    facts: Mapping = field(default_factory=dict)
    labels: tuple[str, ...] = ()

    @classmethod
    def from_folder(
        cls, folder: str | Path, model: nn.Module, *, any_base: bool = False
    ) -> "PeftModuleState":
        """A saved adapter of `model`.

        Args:
            model: the base model, with or without a head.
            any_base: accept an adapter whose file names another base model.

        Raises:
            TransferError: no adapter there, of another base model, of a kind that cannot be moved,
                with tensors that have no place in `model`, or with trained modules other than the
                head, which no map moves.
        """
        config, tensors = load_adapter(Path(folder), model, any_base=any_base)
        return cls._from_state(config, tensors, model, str(folder))

    @classmethod
    def from_model(cls, model: PeftModel, adapter_name: str = "default") -> "PeftModuleState":
        """The module of a live model; tensors are copied.

        Raises:
            TransferError: no PeftModel, no such adapter, or as in `from_folder`.
        """
        if not isinstance(model, PeftModel):
            raise TransferError(f"model: expected a PeftModel, got {type(model).__name__}")
        check_choice("adapter_name", adapter_name, model.peft_config)
        state = adapter_state(model, adapter_name)
        tensors = {name: tensor.detach().cpu().clone() for name, tensor in state.items()}
        config = deepcopy(model.peft_config[adapter_name])
        return cls._from_state(config, tensors, model, f"adapter {adapter_name!r}")

    @classmethod
    def _from_state(
        cls, config: PeftConfig, state: Mapping[str, Tensor], model: nn.Module, source: str
    ) -> "PeftModuleState":
        architecture = Architecture.of(model)
        kind = kind_of(config)
        kind.check(config)
        slots: dict[Slot, dict[str, Tensor]] = {}
        head, strangers = {}, []
        saved = set(config.modules_to_save or ())
        pattern = re.compile(rf"(.+)\.({kind.tensors})")
        for name, tensor in state.items():
            match = pattern.fullmatch(name)
            slot = kind.slot(config, architecture, match[1]) if match else None
            if match and slot:
                slots.setdefault(slot, {})[match[2]] = tensor
            elif match is None and saved & set(name.removeprefix(PREFIX).split(".")):
                head[name.removeprefix(PREFIX)] = tensor
            else:
                strangers.append(name)
        if strangers:
            raise TransferError(
                f"{source}: expected tensors of linears in the blocks {architecture.layers}.* of a "
                f"{architecture.family} model, got {listed(strangers)}"
            )
        if not slots:
            raise TransferError(f"{source}: holds no tensor of a {kind} module")
        in_body = [name for name in head if _is_body(name, model, architecture)]
        if in_body:
            raise TransferError(
                f"{source}: expected no trained modules but the head beside the {kind} module, "
                f"got {listed(in_body)}"
            )
        labels = labels_of(model) if head else ()
        return cls(config, architecture, dict(sorted(slots.items())), head, labels=labels)

    @property
    def kind(self) -> PeftKind:
        """The type of the module."""
        return kind_of(self.config)

    def role(self, place: str) -> Role:
        """The spaces that a place reads and writes."""
        return self.kind.places(self.config, self.architecture)[place].role

    @property
    def spaces(self) -> tuple[str, ...]:
        """Every space that maps are needed for, in the order of the blocks."""
        needed = {space for slot in self.slots for space in self.slot_spaces(slot)}
        return tuple(space for space in self.architecture.spaces if space in needed)

    @property
    def takes_means(self) -> bool:
        """Whether biases can take the constants that means add: a LoRA and IA3 have none."""
        return self.kind.takes_means(self.config)

    def slot_spaces(self, slot: Slot) -> tuple[str, ...]:
        """The spaces of one slot; an IA3 vector lives in one, everything else reads and writes."""
        return self.kind.spaces(self.role(slot.place), self.slots[slot])

    def scaling(self, slot: Slot) -> float:
        """What a LoRA's B A is multiplied by; 1 of every other kind."""
        return self.kind.scaling(self.config, self._module(slot), self.slots[slot])

    def _module(self, slot: Slot) -> str:
        return self.kind.module_name(self.config, self.architecture, slot)

    def state_dict(self) -> dict[str, Tensor]:
        """All tensors, head included, named as PEFT saves them."""
        state = {
            f"{PREFIX}{self._module(slot)}.{name}": tensor
            for slot, tensors in self.slots.items()
            for name, tensor in tensors.items()
        }
        return state | {PREFIX + name: tensor for name, tensor in self.head.items()}


def _is_body(name: str, model: nn.Module, architecture: Architecture) -> bool:
    """`Architecture.is_body`, also beside a base model alone, in which a head has no place."""
    base = without_peft(model)
    if base.base_model is not base:
        return architecture.is_body(name)
    name = name.removeprefix(f"{base.base_model_prefix}.")
    return architecture.is_body(name) and name.split(".")[0] in dict(base.named_children())


def adapter_state(model: PeftModel, adapter_name: str) -> dict[str, Tensor]:
    """Tensors of an adapter and its head, named as in a file."""
    return get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)


def load_config(folder: Path) -> PeftConfig:
    """adapter_config.json of an adapter folder; a TransferError where PEFT cannot read it."""
    return _read(folder, CONFIG, lambda file: PeftConfig.from_pretrained(str(file.parent)))


def load_adapter(
    folder: Path, model: nn.Module, *, any_base: bool
) -> tuple[PeftConfig, dict[str, Tensor]]:
    """Both files of an adapter folder, after `check_base_model`."""
    config = load_config(folder)
    if not any_base:
        check_base_model(config, model, folder)
    return config, _read(folder, WEIGHTS, load_file)


def _read(folder: Path, name: str, read: Callable[[Path], Content]) -> Content:
    if not (folder / name).is_file():
        raise TransferError(f"{folder}: expected an adapter folder with {name}")
    try:
        return read(folder / name)
    except (ValueError, TypeError, KeyError, OSError, SafetensorError) as error:
        raise TransferError(f"{folder / name}: cannot be read ({error})") from error


def check_base_model(config: PeftConfig, model: nn.Module, source: str | Path) -> None:
    """Raise a TransferError unless an adapter belongs to this model, as far as both have a name."""
    expected = without_peft(model).config.name_or_path
    found = config.base_model_name_or_path
    if expected and found and not same_model(expected, found):
        raise TransferError(f"{source}: expected an adapter of {expected}, got one of {found}")


def labels_of(model: nn.Module) -> tuple[str, ...]:
    """What the classes of a model's head are, in their order; none of a model without a head."""
    model = without_peft(model)
    return () if model.base_model is model else tuple(label_names(model.config))


def check_same_labels(module: PeftModuleState, student: nn.Module) -> None:
    """Raise a TransferError where the head of a module has other classes than the student's."""
    ours, theirs = labels_of(student), module.labels
    if ours and theirs and not same_labels(ours, theirs):
        raise TransferError(
            f"head: expected a student with the labels of the module, {', '.join(theirs)}, in this "
            f"order, got {', '.join(ours)}; a head is moved class by class"
        )


def same_model(a: str, b: str) -> bool:
    if a == b:
        return True
    one, other = Path(a), Path(b)
    return one.exists() and other.exists() and one.resolve() == other.resolve()

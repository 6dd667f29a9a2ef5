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

import math
import re
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from modxfer_fast.models.architecture import ROLES, Architecture, Role, without_peft
from modxfer_fast.models.bottleneck import bottleneck_sites, find_site
from modxfer_fast.transfer.errors import TransferError

KINDS: Mapping[str, str] = {
    "LORA": "lora",
    "IA3": "ia3",
    "BOTTLENECK": "bottleneck",
    "COMPACTER": "compacter",
}
_TENSORS = {
    "lora": r"lora_A\.weight|lora_B\.(?:weight|bias)",
    "ia3": r"ia3_l",
    "bottleneck": r"bottleneck_(?:down|up)\.(?:weight|bias)",
    "compacter": r"compacter_(?:down|up)\.(?:left|right|bias|rule)|compacter_rule",
}
PREFIX = "base_model.model."
# initialisations that subtract the first B A from the base weights: the file alone is no update of
# the model it names
_SHIFTED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# variants of newer versions of PEFT whose forward or factors are not those of B A
_LORA_VARIANTS = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)
CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class Slot(NamedTuple):
    """A block and a named place in it."""

    layer: int
    place: str


@dataclass(frozen=True)
class PeftModuleState:
    """One trained module.

    Attributes:
        kind: "lora", "ia3", "bottleneck" or "compacter".
        config: of PEFT, as it was trained or as the student is to load it.
        architecture: of the model the module belongs to.
        slots: tensors of each slot by their names in the table above.
        head: tensors of modules that were trained beside it, e.g. "classifier.weight".
        facts: how it came about, as written beside an adapter.
    """

    kind: str
    config: PeftConfig
    architecture: Architecture
    slots: Mapping[Slot, Mapping[str, Tensor]]
    head: Mapping[str, Tensor] = field(default_factory=dict)
    facts: Mapping = field(default_factory=dict)

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
        folder = Path(folder)
        config = load_config(folder)
        if not any_base:
            check_base_model(config, model, folder)
        return cls._from_state(config, load_tensors(folder), Architecture.of(model), str(folder))

    @classmethod
    def from_model(cls, model: PeftModel, adapter_name: str = "default") -> "PeftModuleState":
        """The module of a live model; tensors are copied.

        Raises:
            TransferError: no PeftModel, no such adapter, or as in `from_folder`.
        """
        if not isinstance(model, PeftModel):
            raise TransferError(f"model: expected a PeftModel, got {type(model).__name__}")
        if adapter_name not in model.peft_config:
            raise TransferError(
                f"adapter_name: expected one of {', '.join(model.peft_config)}, "
                f"got {adapter_name!r}"
            )
        state = get_peft_model_state_dict(
            model, adapter_name=adapter_name, save_embedding_layers=False
        )
        tensors = {name: tensor.detach().cpu().clone() for name, tensor in state.items()}
        config = deepcopy(model.peft_config[adapter_name])
        return cls._from_state(config, tensors, Architecture.of(model), f"adapter {adapter_name!r}")

    @classmethod
    def _from_state(
        cls, config: PeftConfig, state: Mapping[str, Tensor], architecture: Architecture, source
    ) -> "PeftModuleState":
        kind = _kind(config)
        slots: dict[Slot, dict[str, Tensor]] = {}
        head, strangers = {}, []
        pattern = re.compile(rf"(.+)\.({_TENSORS[kind]})")
        for name, tensor in state.items():
            match = pattern.fullmatch(name)
            slot = _slot(kind, config, architecture, match[1]) if match else None
            if slot is not None:
                slots.setdefault(slot, {})[match[2]] = tensor
            elif match is None and _is_saved_module(config, name):
                head[name.removeprefix(PREFIX)] = tensor
            else:
                strangers.append(name)
        if strangers:
            raise TransferError(
                f"{source}: expected tensors of linears in the blocks {architecture.layers}.* of a "
                f"{architecture.family} model, got {_listed(strangers)}"
            )
        if not slots:
            raise TransferError(f"{source}: holds no tensor of a {kind} module")
        in_body = [name for name in head if architecture.is_body(name)]
        if in_body:
            raise TransferError(
                f"{source}: expected no trained modules but the head beside the {kind} module, "
                f"got {_listed(in_body)}"
            )
        return cls(kind, config, architecture, dict(sorted(slots.items())), head)

    def role(self, place: str) -> Role:
        """The spaces that a place reads and writes."""
        return places(self.kind, self.config, self.architecture)[place]

    @property
    def spaces(self) -> tuple[str, ...]:
        """Every space that maps are needed for, in the order of the blocks."""
        needed = {space for slot in self.slots for space in self.slot_spaces(slot)}
        return tuple(space for space in self.architecture.spaces if space in needed)

    @property
    def takes_means(self) -> bool:
        """Whether biases can take the constants that means add: a LoRA and IA3 have none."""
        if self.kind == "lora":
            return bool(self.config.lora_bias)
        return self.kind != "ia3"

    def slot_spaces(self, slot: Slot) -> tuple[str, ...]:
        """The spaces of one slot; an IA3 vector lives in one, everything else reads and writes."""
        role = self.role(slot.place)
        if self.kind != "ia3":
            return tuple(role)
        return (role.reads if _is_feedforward(self.slots[slot]) else role.writes,)

    def scaling(self, slot: Slot) -> float:
        """What a LoRA's B A is multiplied by: alpha / r, or alpha / sqrt(r) with rsLoRA."""
        name = self.architecture.module_name(slot.layer, slot.place)
        patterns = self.config.alpha_pattern
        alpha = patterns.get(get_pattern_key(patterns, name), self.config.lora_alpha)
        rank = self.slots[slot]["lora_A.weight"].shape[0]
        return alpha / (math.sqrt(rank) if self.config.use_rslora else rank)

    def state_dict(self) -> dict[str, Tensor]:
        """All tensors, head included, named as PEFT saves them."""
        state = {}
        for slot, tensors in self.slots.items():
            module = module_name(self.kind, self.config, self.architecture, slot)
            for name, tensor in tensors.items():
                state[f"{PREFIX}{module}.{name}"] = tensor
        return state | {PREFIX + name: tensor for name, tensor in self.head.items()}


def load_config(folder: Path) -> PeftConfig:
    """adapter_config.json of an adapter folder.

    Raises:
        TransferError: missing, unreadable, or of a type that PEFT does not know.
    """
    if not (folder / CONFIG).is_file():
        raise TransferError(f"{folder}: expected an adapter folder with {CONFIG}")
    try:
        return PeftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise TransferError(f"{folder / CONFIG}: cannot be read ({error})") from error


def load_tensors(folder: Path) -> dict[str, Tensor]:
    """adapter_model.safetensors of an adapter folder.

    Raises:
        TransferError: missing or unreadable.
    """
    if not (folder / _WEIGHTS).is_file():
        raise TransferError(f"{folder}: expected an adapter folder with {_WEIGHTS}")
    try:
        return load_file(folder / _WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise TransferError(f"{folder / _WEIGHTS}: cannot be read ({error})") from error


def check_base_model(config: PeftConfig, model: nn.Module, source: str | Path) -> None:
    """That an adapter belongs to this model, as far as both have a name.

    Raises:
        TransferError: naming both.
    """
    expected = without_peft(model).config.name_or_path
    found = config.base_model_name_or_path
    if expected and found and not same_model(expected, found):
        raise TransferError(f"{source}: expected an adapter of {expected}, got one of {found}")


def places(kind: str, config: PeftConfig, architecture: Architecture) -> Mapping[str, Role]:
    """Place -> spaces, for every place that a kind can have in an architecture."""
    if kind in ("lora", "ia3"):
        return {role: ROLES[role] for role in architecture.modules}
    return {
        _site_place(site): Role(site.reads, site.writes)
        for site in bottleneck_sites(architecture, config.placement)
    }


def module_name(kind: str, config: PeftConfig, architecture: Architecture, slot: Slot) -> str:
    """Dotted name of the module that a slot's tensors sit in.

    Raises:
        TransferError: the architecture has no such place; those it has are listed.
    """
    there = places(kind, config, architecture)
    if slot.place not in there:
        raise TransferError(
            f"{slot.place}: a {architecture.family} block has no such place for a {kind} module; "
            f"it has {', '.join(there)}"
        )
    if kind in ("lora", "ia3"):
        return architecture.module_name(slot.layer, slot.place)
    sites = bottleneck_sites(architecture, config.placement)
    paths = {_site_place(site): site.path for site in sites}
    return f"{architecture.layers}.{slot.layer}.{paths[slot.place]}"


def _kind(config: PeftConfig) -> str:
    peft_type = getattr(config.peft_type, "value", config.peft_type)
    if peft_type not in KINDS:
        raise TransferError(f"peft_type: expected one of {', '.join(KINDS)}, got {peft_type}")
    if peft_type == "LORA":
        _check_lora(config)
    return KINDS[peft_type]


def _check_lora(config: PeftConfig) -> None:
    refused = {
        "use_dora": config.use_dora,
        "bias": config.bias != "none",
        "fan_in_fan_out": config.fan_in_fan_out,
        "trainable_token_indices": config.trainable_token_indices,
        "layer_replication": config.layer_replication,
        "target_parameters": config.target_parameters,
        "init_lora_weights": str(config.init_lora_weights).lower().startswith(_SHIFTED_BASE),
        **{name: getattr(config, name, None) for name in _LORA_VARIANTS},
    }
    for name, value in refused.items():
        if value:
            raise TransferError(
                f"{name}: a LoRA with {name}={getattr(config, name)!r} cannot be moved; its "
                "update is not B A of linears alone, on top of the base weights"
            )


def _slot(kind: str, config, architecture: Architecture, name: str) -> Slot | None:
    if kind in ("lora", "ia3"):
        place = architecture.place(name)
        return None if place is None else Slot(*place)
    found = find_site(architecture, config.placement, name)
    return None if found is None else Slot(found[0], _site_place(found[1]))


def _site_place(site) -> str:
    return "attention" if site.writes == "attention_out" else "ffn"


def _is_saved_module(config: PeftConfig, name: str) -> bool:
    parts = name.removeprefix(PREFIX).split(".")
    return any(module in parts for module in config.modules_to_save or ())


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _is_feedforward(tensors: Mapping[str, Tensor]) -> bool:
    return tensors["ia3_l"].shape[0] == 1


def same_model(a: str, b: str) -> bool:
    if a == b:
        return True
    one, other = Path(a), Path(b)
    return one.exists() and other.exists() and one.resolve() == other.resolve()

"""The PEFT configuration with which a student loads a module that was made for its slots."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from copy import deepcopy

from peft import PeftConfig
from torch import Tensor

from modxfer_fast.models.architecture import Architecture
from modxfer_fast.transfer.modules import Slot, module_name, places


def student_config(
    kind: str,
    config: PeftConfig,
    student: Architecture,
    slots: Mapping[Slot, Mapping[str, Tensor]],
    scaling: Mapping[Slot, float] | None = None,
) -> PeftConfig:
    """A copy of the teacher's configuration with the student's names, widths and layers.

    Args:
        kind, config: of the teacher's module.
        slots: the student's tensors.
        scaling: of a LoRA, per slot.
    """
    config = deepcopy(config)
    config.base_model_name_or_path = config.revision = config.auto_mapping = None
    config.inference_mode = False
    config.modules_to_save = None
    config.layers_to_transform = None
    config.exclude_modules = None
    if kind == "lora":
        config.layers_pattern = None
        config.init_lora_weights = True
        _set_ranks(config, student, slots, scaling)
    if kind in ("bottleneck", "compacter"):
        config.bottleneck_size = _bottleneck_size(kind, slots)
        config.reduction_factor = None
    config.target_modules = _targets(kind, config, student, slots)
    if kind == "ia3":
        feedforward = [slot for slot, parts in slots.items() if parts["ia3_l"].shape[0] == 1]
        config.feedforward_modules = (
            _pattern(kind, config, student, feedforward) if feedforward else []
        )
    return config


def _targets(kind, config, student: Architecture, slots: Iterable[Slot]) -> list[str] | str | None:
    """None for every site, paths inside a block for those of every block, else a pattern."""
    slots = set(slots)
    chosen = list(dict.fromkeys(slot.place for slot in sorted(slots)))
    if len(slots) == len(chosen) * student.num_layers:
        if kind in ("bottleneck", "compacter") and len(chosen) == len(
            places(kind, config, student)
        ):
            return None
        if kind == "lora":
            paths = [student.modules[place] for place in chosen]
            others = [path for path in student.modules.values() if path not in paths]
            if not any(other.endswith(f".{path}") for path in paths for other in others):
                return paths
    return _pattern(kind, config, student, slots)


def _pattern(kind, config, student: Architecture, slots: Iterable[Slot]) -> str:
    """A regular expression that matches the whole name of just these modules."""
    names: dict[tuple[int, ...], list[str]] = {}
    layers: dict[str, list[int]] = {}
    for slot in sorted(slots):
        name = module_name(kind, config, student, slot)
        path = name.removeprefix(f"{student.layers}.{slot.layer}.")
        layers.setdefault(path, []).append(slot.layer)
    for path, indices in layers.items():
        names.setdefault(tuple(indices), []).append(re.escape(path))
    blocks = re.escape(student.layers.rpartition(".")[2])
    parts = [
        rf"{blocks}\.({'|'.join(map(str, indices))})\.({'|'.join(paths)})"
        for indices, paths in names.items()
    ]
    return rf"(.*\.)?({'|'.join(parts)})"


def _set_ranks(config, student: Architecture, slots, scaling: Mapping[Slot, float]) -> None:
    """r and lora_alpha as most slots have them; the others by their full names."""
    settings = {}
    for slot, tensors in slots.items():
        rank = tensors["lora_A.weight"].shape[0]
        alpha = scaling[slot] * (math.sqrt(rank) if config.use_rslora else rank)
        # alpha is an integer in PEFT's signature; 16 / 8 * 8 must not become 16.000000000000004
        settings[slot] = rank, round(alpha) if math.isclose(alpha, round(alpha)) else alpha
    config.r, config.lora_alpha = Counter(settings.values()).most_common(1)[0][0]
    config.rank_pattern, config.alpha_pattern = {}, {}
    for slot, (rank, alpha) in settings.items():
        name = re.escape(student.module_name(slot.layer, slot.place))
        if rank != config.r:
            config.rank_pattern[name] = rank
        if alpha != config.lora_alpha:
            config.alpha_pattern[name] = alpha


def _bottleneck_size(kind: str, slots: Mapping[Slot, Mapping[str, Tensor]]) -> int:
    return next(iter(slots.values()))[f"{kind}_down.bias"].shape[0]

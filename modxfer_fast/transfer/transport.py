"""Rewrites a teacher's module for a student, every tensor through the maps of its spaces.

kind         several teacher layers          reduced_rank
lora         factors, or products refactored  closest update of its rank on the student's features
bottleneck   tensors, or units paired first   as ridge: a non-linearity has no closed form
compacter    as bottleneck, all refactored    as ridge
ia3          vectors                          as ridge
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from modxfer_fast.config.transfer_names import HEADS
from modxfer_fast.models.architecture import Architecture
from modxfer_fast.models.families import OUTPUT_EMBEDDINGS
from modxfer_fast.transfer.errors import TransferError, check_choice
from modxfer_fast.transfer.kinds import Slot, Source
from modxfer_fast.transfer.layer_maps import LayerMap
from modxfer_fast.transfer.maps.space_map import Maps
from modxfer_fast.transfer.modules import PeftModuleState, check_same_labels
from modxfer_fast.transfer.statistics import Statistics
from modxfer_fast.transfer.updates import kept_facts, lora_updates, power_kept


def transport(
    module: PeftModuleState,
    maps: Maps,
    layer_map: LayerMap,
    student: Architecture | nn.Module,
    *,
    statistics: Statistics | None = None,
    rank: int | None = None,
    head: str = "fresh",
    head_maps: Maps | None = None,
) -> PeftModuleState:
    """The module for the student, which starts from it; its configuration is the student's.

    A student layer gets a place if one of its teacher layers has it; a teacher layer without it
    counts as an update of 0.

    Args:
        module: of the teacher.
        maps: for the spaces of the module and the pairs of the layer map.
        statistics: needed by reduced_rank; IA3 vectors are fitted on them if given, and the facts
            then tell how close a LoRA's updates come (updates.py).
        rank: of the student's LoRA; None keeps the teacher's.
        head: "fresh": none in the result; "transport": a token classifier is rewritten too.
        head_maps: with the map of the last layers' outputs for the head; None means `maps`.

    Raises:
        TransferError: a place, map or statistic that is missing, spaces that differ, a LoRA rank
            for another kind, a place whose sources all count for nothing, trained output embeddings
            of a language model, a head for other labels than the student's.
    """
    check_choice("head", head, HEADS)
    if not isinstance(student, Architecture):
        if head == "transport":
            check_same_labels(module, student)
        student = Architecture.of(student)
    kind = module.kind
    if rank is not None and (not kind.is_low_rank or rank < 1):
        raise TransferError(
            f"rank: expected a positive number for a LoRA, got {rank} for a {kind} module"
        )
    rewritten: dict[Slot, dict[str, Tensor]] = {}
    scaling: dict[Slot, float] = {}
    kept: list[tuple[Slot, int, tuple[float, float]]] = []
    for slot, teachers in slot_sources(module, layer_map, student).items():
        sources = [_source(module, maps, statistics, slot, *teacher) for teacher in teachers]
        for (teacher, _), source in zip(teachers, sources, strict=True):
            if (power := power_kept(kind, source)) is not None:
                kept.append((slot, teacher.layer, power))
        rewritten[slot] = kind.rewrite(
            sources,
            layer_map.combine,
            rank=rank,
            on_features=maps.method == "reduced_rank",
            seed=len(rewritten),  # each slot its own
        )
        scaling[slot] = sources[0].scaling
    factored, residuals = kind.factored(module.config, rewritten)
    slots = {slot: _finished(module, tensors) for slot, tensors in factored.items()}
    if maps.method == "random_matched":
        slots = _redrawn(slots, int(maps.facts.get("seed") or 0))
    result = PeftModuleState(
        kind.student_config(module.config, student, slots, scaling),
        student,
        slots,
        facts={
            "kind": kind.name,
            "base_model_of_teacher": module.config.base_model_name_or_path,
            "layer_map": layer_map.facts(),
            "method": maps.method,
            "options": maps.options,
            "maps": maps.facts,
            "fits": maps.fits(),
            "head": head,
            "kept": kept_facts(kept),
            "layers_left_out": sorted(_layers(module) - {t for _, t in layer_map.pairs}),
            "notes": _notes(module, student),
            "residuals": {f"{s}.{place}": numbers for (s, place), numbers in residuals.items()},
        },
    )
    _check_finite(result)
    if kind.is_low_rank and statistics is not None:
        updates = lora_updates(module, result, maps, statistics)
        result = replace(result, facts={**result.facts, "updates": updates})
    if head == "transport":
        rewritten_head = rewrite_head(module, head_maps or maps, student)
        result = replace(result, head=rewritten_head, labels=module.labels)
    return result


def slot_sources(
    module: PeftModuleState, layer_map: LayerMap, student: Architecture
) -> dict[Slot, list[tuple[Slot, float]]]:
    """The student's slots, and for each the teacher's slots that it is made of with their weights.

    Checks, as part of `transport`, all that needs no maps.
    """
    of_language = [name for name in module.head if name.split(".")[0] in OUTPUT_EMBEDDINGS]
    if of_language:
        raise TransferError(
            f"modules_to_save: expected a head for a task, got {', '.join(of_language)}, the "
            "trained output embeddings of a language model, which no map moves and the student's "
            "own do not replace; train the module without them"
        )
    _check_places(module, student)
    layer_map.check_fits(student, module.architecture)
    found = {}
    for s, teachers in enumerate(layer_map.sources):
        for place in module.kind.places(module.config, module.architecture):
            slots = [Slot(t, place) for t in teachers]
            pairs = zip(slots, layer_map.weights(s), strict=True)
            there = [(slot, weight) for slot, weight in pairs if slot in module.slots]
            if there and not any(weight for _, weight in there):
                raise TransferError(
                    f"layer_map: {layer_map.combine!r} leaves out the last of the teacher layers "
                    f"{list(teachers)} of student layer {s}, the only one with a module at "
                    f"{place!r}; zeros alone would never train; use 'mean'"
                )
            if there:
                found[Slot(s, place)] = there
    if not found:
        raise TransferError(
            "layer_map: the module has no tensors in any of the teacher layers "
            f"{sorted({t for _, t in layer_map.pairs})}, only in {sorted(_layers(module))}; choose "
            "a map that takes some of them, such as skip_last, uniform, mean or explicit"
        )
    return found


def rewrite_head(
    module: PeftModuleState, maps: Maps, student: Architecture
) -> Mapping[str, Tensor]:
    """A linear classifier on the last hidden state, named as the teacher's, through its read map.

    W_s = W_t read^T     b_s = b_t + W_t offset

    Raises:
        TransferError: a head that is more than one linear on the last block's output.
    """
    names = {name.rpartition(".")[2]: name for name in module.head}
    if set(names) not in ({"weight"}, {"weight", "bias"}) or len(names) != len(module.head):
        raise TransferError(
            "head: 'transport' expects a head that is one linear, got "
            f"{', '.join(module.head) or 'none'} in the module; use 'fresh'"
        )
    task = getattr(module.config.task_type, "value", module.config.task_type)
    if task != "TOKEN_CLS" or not (module.architecture.post_norm and student.post_norm):
        raise TransferError(
            "head: 'transport' expects a token classifier that reads the output of the last block "
            f"in both models, got the task {task} of a {module.architecture.family} model for a "
            f"{student.family} model; use 'fresh'"
        )
    entry = maps["layer_out", student.num_layers - 1, module.architecture.num_layers - 1]
    weight = module.head[names["weight"]]
    head = {names["weight"]: entry.read_weight(weight).to(weight.dtype)}
    if "bias" in names:
        bias = module.head[names["bias"]]
        head[names["bias"]] = (bias.double() + weight.double() @ entry.offset).to(bias.dtype)
    return head


def _layers(module: PeftModuleState) -> set[int]:
    return {slot.layer for slot in module.slots}


def _notes(module: PeftModuleState, student: Architecture) -> list[str]:
    """What no map can carry over, and no figure shows."""
    written = {module.slot_spaces(slot)[-1] for slot in module.slots}
    notes = []
    for one, other in ((module.architecture, student), (student, module.architecture)):
        alone = [s for s in one.norms_behind if s in written and s not in other.norms_behind]
        if alone:
            notes.append(
                f"{', '.join(alone)}: a {one.family} block has norms behind them and a "
                f"{other.family} block has none; how large an update is there does not carry over"
            )
    return notes


def _check_places(module: PeftModuleState, student: Architecture) -> None:
    there = module.kind.places(module.config, student)
    for place in dict.fromkeys(slot.place for slot in module.slots):
        module.kind.module_name(module.config, student, Slot(0, place))
        if there[place].role != module.role(place):
            raise TransferError(
                f"{place}: a {module.kind} module reads and writes {tuple(module.role(place))} in "
                f"a {module.architecture.family} block but {tuple(there[place].role)} in a "
                f"{student.family} block; no map leads from one space to another"
            )


def _source(
    module: PeftModuleState,
    maps: Maps,
    statistics: Statistics | None,
    slot: Slot,
    teacher: Slot,
    weight: float,
) -> Source:
    """What the teacher's slot contributes to the student's."""
    spaces = module.slot_spaces(teacher)
    reads, writes = spaces[0], spaces[-1]
    layers = slot.layer, teacher.layer
    moments = None
    if statistics is not None and reads in statistics.spaces:
        moments = statistics.moments(reads, *layers).on_cpu()
    prefix = module.kind.prefix
    return Source(
        {name.removeprefix(prefix): tensor for name, tensor in module.slots[teacher].items()},
        maps[(reads, *layers)],
        maps[(writes, *layers)],
        weight,
        module.scaling(teacher),
        moments,
    )


def _finished(module: PeftModuleState, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under PEFT's names, in the teacher's dtype."""
    dtype = next(iter(next(iter(module.slots.values())).values())).dtype
    return {
        module.kind.prefix + name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()
    }


def _redrawn(
    slots: Mapping[Slot, Mapping[str, Tensor]], seed: int
) -> dict[Slot, dict[str, Tensor]]:
    """Every tensor drawn anew from the normal distribution with its own mean and deviation.

    Rules of a Compacter stay: all layers share them, and factors were fitted with them.
    """
    generator = torch.Generator().manual_seed(seed)

    def redraw(name: str, tensor: Tensor) -> Tensor:
        if name.endswith("rule"):
            return tensor
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        mean, std = tensor.double().mean(), tensor.double().std(correction=0)
        return (mean + std * noise).to(tensor.dtype)

    return {
        slot: {name: redraw(name, tensor) for name, tensor in tensors.items()}
        for slot, tensors in slots.items()
    }


def _check_finite(module: PeftModuleState) -> None:
    for slot, tensors in module.slots.items():
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise TransferError(
                    f"module: NaN or infinity in {name} of layer {slot.layer}, {slot.place}"
                )

"""Projections of a finished run as files beside the student: what maps its states to the teacher's.

projections.json names the layers and the shapes; projections.safetensors holds `<name>.weight`
[D_t, D_s], or `<name>.up` [D_t, R] and `<name>.down` [R, D_s], and `<name>.bias` [D_t].
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from modxfer_fast.config import HiddenStatesSection
from modxfer_fast.engine.features.terms import FeatureLosses

TENSORS = "projections.safetensors"
LAYERS = "projections.json"
_PREFIX = "hidden.projections."


def save_projections(
    folder: str | Path, features: FeatureLosses, state: dict[str, Tensor] | None = None
) -> None:
    """Writes both files; without projections the map of layers alone, without pairs nothing.

    Args:
        state: state dict of `features` where its own parameters are partitioned.
    """
    loss = features.hidden
    if loss is None:
        return
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = features.state_dict() if state is None else state
    tensors = {
        name.removeprefix(_PREFIX): tensor.detach().cpu().contiguous()
        for name, tensor in state.items()
        if name.startswith(_PREFIX)
    }
    names = {id(module): name for name, module in loss.projections.items()}
    layers = [
        {
            "student": student,
            "teacher": teacher,
            "projection": names.get(id(loss.projection_of((student, teacher)))),
            "weight": weight,
        }
        for (student, teacher), weight in zip(loss.pairs, loss.weights, strict=True)
    ]
    facts = {
        "layers": layers,
        "loss": loss.spec.loss,
        "norm": loss.spec.norm,
        "norm_eps": loss.spec.norm_eps,
        "shapes": {name: list(tensor.shape) for name, tensor in tensors.items()},
    }
    if tensors:
        save_file(tensors, folder / TENSORS)
    (folder / LAYERS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def load_projections(folder: str | Path, features: FeatureLosses) -> None:
    """Puts the projections saved in `folder` back.

    Raises:
        ValueError: there are none, or others.
    """
    if not list(features.parameters()):
        return
    path = Path(folder) / TENSORS
    if not path.is_file():
        raise ValueError(
            f"resume_from_checkpoint: expected {TENSORS} in {folder}, because hidden_states has "
            "projections; found none"
        )
    state = {_PREFIX + name: tensor for name, tensor in load_file(path).items()}
    expected = {name: tuple(tensor.shape) for name, tensor in features.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if found != expected:
        raise ValueError(
            f"resume_from_checkpoint: {path} holds the projections {found}, expected {expected}"
        )
    features.load_state_dict(state)


@torch.no_grad()
def set_projections(features: FeatureLosses, maps: Mapping[int, Any]) -> None:
    """Puts given maps in place of full projections with a bias, which then do not train.

    Args:
        maps: {student layer: map} for each pair, a matrix [d_s, d_t], or an object with `read`
            [d_s, d_t] and `offset` [d_t].

    Raises:
        ValueError: other layers than those of the pairs, or a map of another shape.
    """
    behind_last = features.num_student_layers + 1
    given = {layer if layer >= 0 else layer + behind_last: maps[layer] for layer in maps}
    loss: Any = features.hidden
    pairs = {pair[0]: pair for pair in loss.pairs}
    if set(given) != set(pairs):
        raise ValueError(
            f"hidden.maps: expected one for each student layer {', '.join(map(str, pairs))}, "
            f"got {', '.join(map(str, maps))}"
        )
    for layer, pair in pairs.items():
        projection, value = loss.projection_of(pair), given[layer]
        read = value if isinstance(value, Tensor) else value.read
        if tuple(read.T.shape) != tuple(projection.weight.shape):
            expected = tuple(reversed(projection.weight.shape))
            raise ValueError(
                f"hidden.maps: expected shape {expected} for layer {layer}, got {tuple(read.shape)}"
            )
        projection.weight.copy_(read.T)
        if not isinstance(value, Tensor):
            projection.bias.copy_(value.offset)
        projection.requires_grad_(False)


def group_projections(
    optimizer: torch.optim.Optimizer,
    projections: list[nn.Parameter],
    options: HiddenStatesSection,
    weight_decay: float,
) -> None:
    """Gives projections a group of their own where they have options of their own.

    Args:
        weight_decay: where the options name none.
    """
    if not projections or (options.learning_rate is None and options.weight_decay is None):
        return
    own = {id(param) for param in projections}
    for group in optimizer.param_groups:
        group["params"] = [param for param in group["params"] if id(param) not in own]
    group = {"params": projections}
    if options.learning_rate is not None:
        group["lr"] = options.learning_rate
    given = options.weight_decay
    group["weight_decay"] = weight_decay if given is None else given
    optimizer.add_param_group(group)

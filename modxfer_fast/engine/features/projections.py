"""Projections of a finished run as files beside the student: what maps its states to the teacher's.

projections.json names the layers and the shapes; projections.safetensors holds `<name>.weight`
[D_t, D_s], or `<name>.up` [D_t, R] and `<name>.down` [R, D_s], and `<name>.bias` [D_t].
"""

import json
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

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

"""The head and the final norm of a teacher, without the rest of it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import cached_file

from modxfer_fast.config.model import CheckpointSection
from modxfer_fast.engine.students.causal_lm import SplitCausalLM
from modxfer_fast.errors import ModelError
from modxfer_fast.models import causal_skeleton
from modxfer_fast.teacher_cache.importers import TeacherHead

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


def load_head(path: str, section: CheckpointSection) -> tuple[PreTrainedModel, TeacherHead]:
    """A model of which head and final norm alone have values.

    Args:
        path: folder or hub id of a model in safetensors files; the section says how it is loaded.

    Raises:
        ModelError: nothing there, or without these weights.
    """
    model = causal_skeleton(path, section)
    model.tie_weights()
    parts = SplitCausalLM.of(model, "teacher")
    norm = final_norm(parts.backbone)
    read = [module for module in (parts.head, norm) if module is not None]
    _fill(model, read, path, section)
    parts = SplitCausalLM.of(model, "teacher")  # now that the head can say what bends its logits
    head = TeacherHead(parts.head.weight, parts.head.bias, parts.bend, norm)
    return model, head


def final_norm(backbone: nn.Module) -> nn.Module | None:
    """The last norm among what a backbone consists of, blocks aside."""
    norms = [each for each in backbone.children() if "norm" in type(each).__name__.lower()]
    return norms[-1] if norms else None


def _fill(
    model: PreTrainedModel, modules: list[nn.Module], path: str, section: CheckpointSection
) -> None:
    """Gives the parameters of modules their values from the files."""
    named = list(model.named_parameters(remove_duplicate=False))
    places = dict(_tensors(path, section))
    dtype = getattr(torch, section.dtype) if section.dtype else None
    for module in modules:
        for own, parameter in list(module.named_parameters(recurse=False)):
            names = [name for name, other in named if other is parameter]
            prefix = f"{model.base_model_prefix}."
            bare = [name.removeprefix(prefix) for name in names]  # of a backbone saved alone
            found = next((name for name in (*names, *bare) if name in places), None)
            if found is None:
                raise ModelError(
                    f"model {path}: expected {' or '.join(names)} in its safetensors files, "
                    "got none"
                )
            with safe_open(places[found], framework="pt") as file:
                value = file.get_tensor(found)
            if value.shape != parameter.shape:
                raise ModelError(
                    f"model {path}: {found}: expected shape {list(parameter.shape)}, "
                    f"got {list(value.shape)}"
                )
            setattr(module, own, nn.Parameter(value.to(dtype or value.dtype), requires_grad=False))


def _tensors(path: str, section: CheckpointSection) -> Iterator[tuple[str, str]]:
    """Names of the tensors of a checkpoint, and the file that each is in."""
    try:
        index = _file(path, _INDEX, section)
        if index is not None:
            names = json.loads(Path(index).read_text())["weight_map"]
            files = {file: _file(path, file, section) for file in set(names.values())}
            for name, file in names.items():
                if files[file] is not None:
                    yield name, files[file]
            return
        single = _file(path, _SINGLE, section)
        if single is None:
            raise ModelError(f"model {path}: expected {_SINGLE} or {_INDEX}, got neither")
        with safe_open(single, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118, it is no mapping
                yield name, single
    except (OSError, SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ModelError(f"model {path}: cannot be loaded ({error})") from error


def _file(path: str, name: str, section: CheckpointSection) -> Any:
    return cached_file(
        str(Path(path).expanduser()) if path.startswith("~") else path,
        name,
        revision=section.revision,
        _raise_exceptions_for_missing_entries=False,
    )

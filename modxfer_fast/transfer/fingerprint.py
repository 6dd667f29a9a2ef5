"""Digests of weights: whether an artefact was made from this very model or module."""

import hashlib
from collections.abc import Iterable

import torch
from peft import PeftModel
from torch import Tensor, nn

from modxfer_fast.models.architecture import without_peft
from modxfer_fast.models.families import POOLER
from modxfer_fast.transfer.modules import adapter_state


def model_fingerprint(model: nn.Module) -> str:
    """SHA-256 of names, dtypes, shapes and values of the parameters that make the features.

    Heads and the pooler behind the last block are left out, and so is a PEFT module: a checkpoint
    has the same fingerprint under every task head, which is drawn anew each time.
    """
    prefix = getattr(model.base_model, "prefix", None) if isinstance(model, PeftModel) else None
    backbone = without_peft(model).base_model
    parameters = {}
    for name, parameter in backbone.named_parameters():
        name = name.replace(".base_layer.", ".")
        if name.startswith(f"{POOLER}.") or (prefix and prefix in name):
            continue
        parameters[name] = parameter
    return _digest(parameters.items())


def module_fingerprint(model: nn.Module) -> str | None:
    """SHA-256 of the tensors of the PEFT modules that are active, without heads; None of no module.

    One is told by its tensors alone, several also by their names.
    """
    names = model.active_adapters if isinstance(model, PeftModel) else []
    prefix = getattr(model.base_model, "prefix", "")
    tensors = [
        (name if len(names) == 1 else f"{adapter}.{name}", tensor)
        for adapter in names
        for name, tensor in adapter_state(model, adapter).items()
        if prefix in name
    ]
    return _digest(tensors) if names else None


def _digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        values = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(values.view(torch.uint8).numpy().data)
    return digest.hexdigest()

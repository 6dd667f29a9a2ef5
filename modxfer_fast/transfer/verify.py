"""Checks that a student really loads a module: every tensor, the right shapes, finite outputs."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from modxfer_fast.transfer.attach import adapter_state, attach, check_tensors, unequal
from modxfer_fast.transfer.errors import TransferError
from modxfer_fast.transfer.modules import PeftModuleState, load_adapter

_ADAPTER = "default"


@dataclass(frozen=True)
class VerifyReport:
    """What was found; a report is only made of a module that passed.

    Attributes:
        loaded: names of all tensors, each read back from the student equal to its file.
        parameters: numbers in them.
        change: root mean square of the change of the output over that of the output, on the batch;
            0 means that the module does nothing.
    """

    loaded: tuple[str, ...]
    parameters: int
    change: float


def verify(
    module: PeftModuleState | str | Path,
    student: nn.Module,
    *,
    batch: Mapping[str, Tensor] | None = None,
    any_base: bool = False,
) -> VerifyReport:
    """Loads the module into a copy of the student, as any user of PEFT would.

    Args:
        module: a folder, or a module in memory.
        batch: inputs of the student; None: rows of random ids.
        any_base: accept a folder that names another base model.

    Raises:
        TransferError: a tensor that is missing, left over, of another shape or not loaded as it is
            in the file; shapes other than those of a freshly made module; an output with NaN or
            infinity; an adapter of another base model.
    """
    if isinstance(student, PeftModel):
        raise TransferError("student: expected a model without PEFT, got a PeftModel")
    copy = deepcopy(student)
    if isinstance(module, PeftModuleState):
        model, expected = attach(module, copy, _ADAPTER), module.state_dict()
    else:
        model, expected = _load(Path(module), copy, any_base)
    loaded = adapter_state(model, _ADAPTER)
    for name in unequal(expected, loaded):
        if expected[name].isnan().any():
            raise TransferError(f"module: NaN or infinity in {name}")
        raise TransferError(f"module: {name} is not in the student as it is in the file")
    return VerifyReport(
        loaded=tuple(loaded),
        parameters=sum(tensor.numel() for tensor in loaded.values()),
        change=_change(model, batch),
    )


def _load(folder: Path, student: nn.Module, any_base: bool) -> tuple[PeftModel, dict[str, Tensor]]:
    config, tensors = load_adapter(folder, student, any_base=any_base)
    # what a fresh module has is compared first: PEFT's own errors name one tensor or none
    try:
        fresh = get_peft_model(deepcopy(student), deepcopy(config), _ADAPTER)
    except ValueError as error:
        raise TransferError(f"{folder}: the student has no place for it ({error})") from error
    check_tensors(tensors, adapter_state(fresh, _ADAPTER))
    try:
        model = PeftModel.from_pretrained(student, str(folder), adapter_name=_ADAPTER)
    except (ValueError, RuntimeError, KeyError) as error:
        raise TransferError(f"{folder}: the student cannot load it ({error})") from error
    return model, tensors


@torch.no_grad()
def _change(model: PeftModel, batch: Mapping[str, Tensor] | None) -> float:
    model.eval()
    device = next(model.parameters()).device
    if batch is None:
        generator = torch.Generator().manual_seed(0)
        config = model.config.get_text_config()
        # a decoder's head cannot tell the ends of several rows without a padding token
        rows = 1 if config.pad_token_id is None else 2
        batch = {"input_ids": torch.randint(0, config.vocab_size, (rows, 8), generator=generator)}
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    with_module = _output(model, batch)
    if not with_module.isfinite().all():
        raise TransferError("module: the student's output with it holds NaN or infinity")
    with model.disable_adapter():
        without = _output(model, batch)
    norm = without.norm().item()
    return (with_module - without).norm().item() / norm if norm else 0.0


def _output(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    output = model(**batch)
    return (output.logits if "logits" in output else output.last_hidden_state).double()

"""FSDP2, `fully_shard`, for the trainer: what accelerate leaves to its user, or does silently.

Blocks are groups of their own, as accelerate wraps them, and so are embeddings that are not tied.
The rest, the head above all, belongs to the group of the whole DistillModule: it is whole while
that module's forward, which reads the head without calling it, runs.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DistributedType,
    FullyShardedDataParallelPlugin,
    broadcast_object_list,
)
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy

from modxfer_fast.config.errors import nearest
from modxfer_fast.engine.deepspeed import check_launched
from modxfer_fast.engine.hooks import without_hooks

# Keys of fsdp_config that say something of FSDP2; transformers ignores any other without a word.
KEYS = (
    "version",
    "reshard_after_forward",
    "state_dict_type",
    "auto_wrap_policy",
    "transformer_layer_cls_to_wrap",
)
_REFUSED = {
    "activation_checkpointing": "ask by training.activation_checkpointing",
    "cpu_offload": "gradients on the host have no way to other ranks; ask for zero_stage 3 with "
    "offload_param in a DeepSpeed configuration",
    "min_num_params": "a group of the head alone is not whole where the loss reads its weight",
    "cpu_ram_efficient_loading": "the teacher would have no weights but on the first rank",
    "xla": "FSDP2 of PyTorch is what runs",
    "xla_fsdp_v2": "FSDP2 of PyTorch is what runs",
    "xla_fsdp_grad_ckpt": "FSDP2 of PyTorch is what runs",
}
STATE_DICTS = ("FULL_STATE_DICT", "SHARDED_STATE_DICT")
_ONE_OF = {
    "state_dict_type": STATE_DICTS,
    "auto_wrap_policy": ("TRANSFORMER_BASED_WRAP", "NO_WRAP"),
}
_STATE = "fsdp_state"  # in a checkpoint: a folder of parts; one file where it ends in .pt


def check_config(config: dict[str, Any]) -> None:
    """Raises ValueError for what of `fsdp_config` would be ignored, or cannot work here."""
    for key, value in config.items():
        name = str(key).removeprefix("fsdp_")
        if name in _REFUSED:
            if value:
                raise ValueError(
                    f"fsdp_config.{key}: expected it off, got {value!r}; {_REFUSED[name]}"
                )
        elif name not in KEYS:
            raise ValueError(f"fsdp_config.{key}: unknown key{nearest(name, KEYS)}")
        elif name == "version" and value != 2:
            raise ValueError(
                f"fsdp_config.{key}: expected 2, got {value!r}; the first FSDP has flat parameters "
                "in place of the head that the loss reads"
            )
        elif name in _ONE_OF and value not in _ONE_OF[name]:
            raise ValueError(
                f"fsdp_config.{key}: expected one of {', '.join(_ONE_OF[name])}, got {value!r}"
            )


def check_environment() -> None:
    """Raises RuntimeError where the processes were not started by a launcher, or are too few."""
    check_launched("fsdp")
    if not torch.accelerator.is_available() and os.environ["WORLD_SIZE"] == "1":
        raise RuntimeError("fsdp: expected several processes on a CPU, got 1")


def launcher_asks() -> bool:
    """Whether `accelerate launch --use_fsdp` started this process."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def take_launcher_switch() -> None:
    """Takes it back once a configuration has FSDP itself.

    Left alone it makes one that only evaluates ask for it too, and transformers load models on the
    first rank alone.
    """
    os.environ.pop("ACCELERATE_USE_FSDP", None)


def settle(accelerator: Accelerator, plugin_args: dict[str, Any]) -> None:
    """Makes an accelerator what `plugin_args` ask for.

    On a CPU accelerate drops FSDP without a word: its state takes the plugin on GPUs alone. In half
    precision it has the outputs of every group, the loss among them, and the sums of gradients over
    ranks rounded to it, and every input cast, among them what a teacher answered before.
    """
    state: Any = accelerator.state
    if state.distributed_type != DistributedType.FSDP:
        state.fsdp_plugin = FullyShardedDataParallelPlugin(**plugin_args)
        state.distributed_type = DistributedType.FSDP
        # what each later AcceleratorState() takes over
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    if accelerator.mixed_precision == "bf16":
        state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )


@contextlib.contextmanager
def wrapping(module: Any) -> Iterator[None]:
    """Inside, accelerate may wrap a DistillModule.

    It gives embeddings a group of their own. Tied to the head they belong where the head is.
    """
    if module.has_tied_head:
        module.get_input_embeddings = lambda: None
    try:
        yield
    finally:
        vars(module).pop("get_input_embeddings", None)


def is_sharded(module: nn.Module) -> bool:
    """Whether `fully_shard` has been called on a module."""
    return isinstance(module, FSDPModule)


def reshard(module: nn.Module) -> None:
    """Lets go of parameters that a forward without a backward has gathered and left whole."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


@contextlib.contextmanager
def whole(module: nn.Module) -> Iterator[None]:
    """A sharded module whole inside the block, in which ranks may call its parts as often as they
    like, in the dtype that forward computes in. Collective where the block begins.

    The hooks that gather for a call, and give up after it, are away meanwhile.
    """
    groups = [part for part in module.modules() if isinstance(part, FSDPModule)]
    with without_hooks(module, _is_hook):
        try:
            for group in groups:
                group.unshard()
            yield
        finally:
            for group in groups:
                group.reshard()


def _is_hook(hook: Any) -> bool:
    return (getattr(hook, "__module__", None) or "").startswith("torch.distributed.fsdp.")


def save_state(
    folder: str | Path,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    whole: bool,
    only_trainable: bool,
    is_writer: bool,
) -> None:
    """Writes a sharded module and its optimiser into a checkpoint. Collective.

    Args:
        whole: as one file of the writer, else as one of each rank's parts.
        only_trainable: leave out frozen parameters.
    """
    state = _state(module, optimizer, whole, only_trainable)
    if not whole:
        dcp.save(state, checkpoint_id=Path(folder) / _STATE)
    elif is_writer:
        torch.save(state, Path(folder) / f"{_STATE}.pt")


def load_state(
    folder: str | Path,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    only_trainable: bool,
    is_writer: bool,
) -> None:
    """Reads what `save_state` wrote, in either form. Collective."""
    path = Path(folder) / _STATE
    whole = not path.is_dir()
    if not whole:
        state = _state(module, optimizer, whole, only_trainable)
        dcp.load(state, checkpoint_id=path)
    else:  # the other ranks are told by the first one
        state = torch.load(f"{path}.pt", weights_only=True) if is_writer else {}
    options = _options(whole, only_trainable)
    # `set_state_dict` takes a rank that has nothing for one that wants nothing
    set_model_state_dict(module, state.get("model", {}), options=options)
    if whole:  # of an optimiser that keeps nothing, such as plain SGD, torch takes nothing back
        keeps = broadcast_object_list([any(state.get("optimizer", {}).get("state", {}).values())])
        if not keeps[0]:
            return
    set_optimizer_state_dict(module, optimizer, state.get("optimizer", {}), options=options)


def _state(
    module: nn.Module, optimizer: torch.optim.Optimizer, whole: bool, only_trainable: bool
) -> dict[str, Any]:
    options = _options(whole, only_trainable)
    model, optim = get_state_dict(module, optimizer, options=options)
    return {"model": model, "optimizer": optim}


def _options(whole: bool, only_trainable: bool) -> StateDictOptions:
    return StateDictOptions(
        full_state_dict=whole,
        cpu_offload=whole,
        broadcast_from_rank0=whole,
        ignore_frozen_params=only_trainable,
        strict=not only_trainable,
    )

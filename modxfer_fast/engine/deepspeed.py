"""DeepSpeed for the trainer: configuration of a ZeRO stage, guards where it fails silently."""

import contextlib
import functools
import importlib.metadata
import json
import os
from collections.abc import Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor, nn
from transformers.integrations import deepspeed as hf_deepspeed
from transformers.integrations.deepspeed import HfDeepSpeedConfig

from modxfer_fast.config.errors import nearest
from modxfer_fast.engine import checksums
from modxfer_fast.engine.hooks import without_hooks
from modxfer_fast.kernels.common.gathered import full_tensor
from modxfer_fast.models.checks import is_deepspeed_hook, is_partitioned

# From 0.18.3 to 0.19.5 every tensor that the engine returns is scaled by 1 / accumulation steps.
MIN_DEEPSPEED = Version("0.19.6")
STAGES = (0, 1, 2, 3)
_TIMEOUT_S = 1800  # as of TrainingArguments.ddp_timeout
BUCKET = 500_000_000  # gradients on their way between ranks, where a configuration says nothing


def zero_config(stage: int) -> dict:
    """Configuration of one ZeRO stage; batch, clipping and precision follow the trainer."""
    if stage not in STAGES:
        raise ValueError(
            f"zero_stage: expected one of {', '.join(map(str, STAGES))}, got {stage!r}"
        )
    return {
        "zero_optimization": {"stage": stage},
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
    }


def load_config(deepspeed: dict | str) -> dict:
    """A DeepSpeed configuration from a dictionary, a JSON string, or the path of a JSON file."""
    if isinstance(deepspeed, dict):
        return deepspeed
    if deepspeed.lstrip().startswith("{"):
        return json.loads(deepspeed)
    path = Path(deepspeed)
    if not path.is_file():
        raise FileNotFoundError(f"deepspeed: expected a JSON file, found none at {path}")
    return json.loads(path.read_text())


def fit_bucket(config: dict, params: Iterable[Tensor]) -> None:
    """Writes a bucket no larger than the gradients of `params` into a configuration without one.

    DeepSpeed allocates its bucket in full, by default 2 GB in fp32, also for a student of 50 MB.
    """
    number = sum(getattr(p, "ds_numel", p.numel()) for p in params if p.requires_grad)
    zero = config.setdefault("zero_optimization", {})
    zero.setdefault("reduce_bucket_size", max(min(BUCKET, number), 1))


def check_config(config: dict) -> None:
    """Raises ValueError for what DeepSpeed would ignore."""
    for key in config:
        if "." in key:
            outer, inner = key.split(".", 1)
            raise ValueError(
                f"deepspeed: {key!r} would be ignored silently, "
                f"nest it: {{{outer!r}: {{{inner!r}: ...}}}}"
            )
        if isinstance(config[key], dict):
            check_config(config[key])


def check_keys(config: dict) -> None:
    """Raises ValueError for a section or value that DeepSpeed never looks for."""
    known = _known_keys()
    for key in config:
        if key not in known:
            raise ValueError(
                f"deepspeed: {key!r} would be ignored silently, DeepSpeed knows no such key"
                f"{nearest(key, known)}"
            )


@functools.cache
def _known_keys() -> frozenset[str]:
    from deepspeed.runtime.config import DeepSpeedConfig

    config = _Asked(train_micro_batch_size_per_gpu=1)
    DeepSpeedConfig(config)
    # the others are read where nobody looks at a whole configuration
    others = "autotuning", "data_parallel_size", "sequence_parallel_size", "train_steps"
    return frozenset({*config.names, *others})


class _Asked(dict):
    """A configuration that keeps the names which are looked for in it."""

    def __init__(self, **values: Any) -> None:
        super().__init__(values)
        self.names = set(values)

    def __contains__(self, key) -> bool:
        self.names.add(key)
        return super().__contains__(key)

    def get(self, key, default=None):
        self.names.add(key)
        return super().get(key, default)

    def keys(self):
        return self

    def __copy__(self):
        return self


def check_environment() -> None:
    """Raises where DeepSpeed would be wrong, stay inactive, or fail far from the cause.

    Raises:
        ImportError: DeepSpeed is missing or too old.
        RuntimeError: the processes were not started by a launcher.
    """
    try:
        version = Version(importlib.metadata.version("deepspeed"))
    except importlib.metadata.PackageNotFoundError:
        raise ImportError("deepspeed: not installed; pip install 'modxfer-fast[engine]'") from None
    if version < MIN_DEEPSPEED:
        raise ImportError(
            f"deepspeed: expected >= {MIN_DEEPSPEED}, got {version}, which scales gradients "
            "wrongly under gradient accumulation"
        )
    check_launched("deepspeed")


def check_launched(who: str) -> None:
    """Raises RuntimeError where no launcher started this process; `who` needs one."""
    missing = [name for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE") if name not in os.environ]
    if missing:
        raise RuntimeError(
            f"{who}: {', '.join(missing)} not set; start with a launcher, also for one "
            "process: torchrun --nproc-per-node 1 ..."
        )


def take_cpu_switch() -> bool:
    """Takes back Accelerate's ACCELERATE_USE_CPU, and returns whether it was on.

    `accelerate launch --cpu` sets it; left alone it makes Accelerate drop DeepSpeed without a word.
    """
    return os.environ.pop("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")


def start(use_cpu: bool, timeout_s: int = _TIMEOUT_S) -> None:
    """Opens the process group, which must exist before ZeRO-3 partitions a model that loads.

    Args:
        timeout_s: how long a collective may wait; without one DeepSpeed takes 10 minutes, less than
            what else is told of a rank that stands still.
    """
    if use_cpu:
        _disable_shared_memory_op()
        # DeepSpeed picks its accelerator once, at import; Trainer's use_cpu alone does not reach it
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(
            dist_backend="gloo" if use_cpu else None,
            auto_mpi_discovery=False,
            verbose=False,
            timeout=timedelta(seconds=timeout_s),
        )


def _disable_shared_memory_op() -> None:
    """Keeps CPU ranks on gloo: the op compiles for a minute, a killed build blocks later ones."""
    import deepspeed
    from deepspeed.git_version_info import installed_ops

    name = "deepspeed_shm_comm"
    if not installed_ops.get(name, False):
        deepspeed.ops.__compatible_ops__[name] = False


@contextlib.contextmanager
def contained_launch_flag() -> Iterator[None]:
    """Takes back what Accelerate sets, which would make a later trainer one of ZeRO, or FSDP."""
    names = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP")
    absent = [name for name in names if name not in os.environ]
    try:
        yield
    finally:
        for name in absent:
            os.environ.pop(name, None)


@contextlib.contextmanager
def gathered(params: Iterable[Tensor | None]) -> Iterator[None]:
    """Whole parameters inside the block. A collective call under ZeRO-3, else nothing."""
    given: list[Any] = [p for p in params if p is not None and is_partitioned(p)]
    split = [p for p in given if p.ds_status.name != "AVAILABLE"]
    if not split:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(split):
        yield


@contextlib.contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """A partitioned model whole inside the block, in which ranks may call it as often as they like.

    Collective where the block begins and ends; of a model that is not partitioned, nothing. The
    engine's hooks, which would give each parameter up after the first call, are away meanwhile.
    """
    if not any(is_partitioned(param) for param in model.parameters()):
        yield
        return
    with without_hooks(model, is_deepspeed_hook), gathered(model.parameters()):
        yield


def partition(model: nn.Module, *, offload: bool) -> None:
    """Divides the parameters of a frozen model over the ranks, in place. Collective.

    Args:
        offload: keep the parts in the memory of the host.

    Raises:
        RuntimeError: the processes were not started by a launcher.
    """
    if all(is_partitioned(param) for param in model.parameters()):
        return
    check_environment()
    start(use_cpu=not torch.accelerator.is_available())
    import deepspeed

    deepspeed.zero.Init(module=model, config_dict_or_path=_in_parts(offload))


@contextlib.contextmanager
def loading_in_parts(*, offload: bool) -> Iterator[None]:
    """Inside, what transformers loads is divided over the ranks as it comes. Collective."""
    check_environment()
    start(use_cpu=not torch.accelerator.is_available())
    before = hf_deepspeed._hf_deepspeed_config_weak_ref
    config = HfDeepSpeedConfig(_in_parts(offload))  # transformers looks for it while it lives
    try:
        yield
    finally:
        del config
        hf_deepspeed._hf_deepspeed_config_weak_ref = before


def _in_parts(offload: bool) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": 3}
    if offload:
        pin = torch.accelerator.is_available()
        zero["offload_param"] = {"device": "cpu", "pin_memory": pin}
    return {"zero_optimization": zero, "train_micro_batch_size_per_gpu": 1}


def materialise(model: nn.Module) -> None:
    """Replaces partitioned parameters by whole ones, in place; ties are kept. Collective."""
    whole: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, param in module._parameters.items():
            if param is None or not is_partitioned(param):
                continue
            if param.ds_id not in whole:
                with gathered([param]):
                    data = param.detach().clone()
                whole[param.ds_id] = nn.Parameter(data, requires_grad=param.requires_grad)
            module._parameters[name] = whole[param.ds_id]


def whole_state_dict(module: nn.Module, keep: bool, only_trainable: bool) -> dict[str, Tensor]:
    """State of a partitioned or sharded module, gathered one parameter at a time. Collective.

    Args:
        keep: whether this rank wants the values, on the CPU; else the result is empty.
        only_trainable: leave out frozen parameters.

    Raises:
        RuntimeError: what was gathered is not what the ranks hold.
    """
    parts: dict[str, Any] = {}
    values: dict[int, Tensor] = {}  # by identity: a tied parameter is gathered once
    state: dict[str, Tensor] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if only_trainable and isinstance(tensor, nn.Parameter) and not tensor.requires_grad:
            continue
        if id(tensor) not in values:
            parts[name] = checksums.of_own_part(tensor)
            with gathered([tensor] if isinstance(tensor, nn.Parameter) else []):
                value = full_tensor(tensor.detach())
                values[id(tensor)] = value.to("cpu", copy=True) if keep else tensor
        if keep:
            state[name] = values[id(tensor)]
    checksums.check_gathered(state, parts)
    return state


@contextlib.contextmanager
def gathered_on_call(module: nn.Module) -> Iterator[None]:
    """Lets a partitioned module run without an engine: each submodule is whole while it is called.

    A DeepSpeed engine for inference would do the same, but leaves state behind that breaks the
    training engine made after it. Parameters that are read without calling their module are not
    covered.
    """
    hooks = []
    for submodule in module.modules():
        own = list(submodule.parameters(recurse=False))
        if not any(is_partitioned(param) for param in own):
            continue
        open_blocks: list[contextlib.ExitStack] = []

        def enter(*args, own=own, open_blocks=open_blocks):
            open_blocks.append(contextlib.ExitStack())
            open_blocks[-1].enter_context(gathered(own))

        def leave(*args, open_blocks=open_blocks):
            open_blocks.pop().close()

        hooks.append(submodule.register_forward_pre_hook(enter))
        hooks.append(submodule.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def gathered_as(stand_in: nn.Module, module: nn.Module) -> None:
    """While `stand_in` is called, what gathers the parameters of `module` for a call does so."""

    def before(_, inputs):
        for hook in _gathering(module._forward_pre_hooks):
            hook(module, inputs)

    def after(_, inputs, output):
        for hook in _gathering(module._forward_hooks):
            hook(module, inputs, output)

    stand_in.register_forward_pre_hook(before)
    stand_in.register_forward_hook(after)


def _gathering(hooks: dict[int, Any]) -> list[Any]:
    """Those of DeepSpeed and of `gathered_on_call`."""
    return [h for h in hooks.values() if is_deepspeed_hook(h) or h.__module__ == __name__]

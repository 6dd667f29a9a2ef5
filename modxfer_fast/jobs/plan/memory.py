"""Bytes of each rank, part by part, from shapes alone."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from modxfer_fast.engine import deepspeed
from modxfer_fast.engine.features.taps import LayerTaps
from modxfer_fast.engine.students.causal_lm import SplitCausalLM

# DeepSpeed's own defaults, elements
_BUCKET, _LIVE = 500_000_000, 1_000_000_000
_STATE_BYTES = {"sgd": 0, "adafactor": 0, "lion": 4}  # of a parameter in fp32; else Adam's two


@dataclasses.dataclass(frozen=True)
class Sharding:
    """How a student is divided.

    Attributes:
        ranks: processes of the job.
        stage: of ZeRO, None without DeepSpeed.
        offloads: what stays in the memory of the host, of "optimizer" and "parameters".
        bucket: elements of DeepSpeed's bucket of gradients.
        live: elements of parameters that may be whole at once under ZeRO-3.
        fsdp: whether FSDP2 divides it, which shares what stage 3 shares.
    """

    ranks: int
    stage: int | None = None
    offloads: tuple[str, ...] = ()
    bucket: int = _BUCKET
    live: int = _LIVE
    fsdp: bool = False

    @classmethod
    def of(cls, training: Mapping[str, Any], ranks: int) -> "Sharding":
        """As the `training` section of a job says."""
        given = training.get("deepspeed")
        zero = deepspeed.load_config(given).get("zero_optimization", {}) if given else {}
        stage = training.get("zero_stage")
        if stage is None and given:
            stage = zero.get("stage", 0)
        if training.get("fsdp"):
            return cls(ranks, 3, fsdp=True)
        keys = {"optimizer": "offload_optimizer", "parameters": "offload_param"}
        offloads = tuple(
            name for name, key in keys.items() if zero.get(key, {}).get("device", "none") != "none"
        )
        sizes = (
            (zero.get("reduce_bucket_size"), _BUCKET),
            (zero.get("stage3_max_live_parameters"), _LIVE),
        )
        bucket, live = (size if isinstance(size, int) else usual for size, usual in sizes)
        return cls(ranks, stage, offloads, bucket, live)

    def over(self, part: str) -> int:
        """Ranks that share a part: "optimizer", "gradients" or "parameters"."""
        least = {"optimizer": 1, "gradients": 2, "parameters": 3}[part]
        return self.ranks if self.stage is not None and self.stage >= least else 1


@dataclasses.dataclass(frozen=True)
class Part:
    """Bytes of a rank, and what they are."""

    name: str
    bytes: int
    note: str = ""


def half_dtype(training: Mapping[str, Any]) -> torch.dtype | None:
    """In which the student is computed, None for that of its weights."""
    return (
        torch.bfloat16 if training.get("bf16") else torch.float16 if training.get("fp16") else None
    )


def parts_of_student(
    student: nn.Module, training: Mapping[str, Any], sharding: Sharding
) -> list[Part]:
    """Parameters, gradients, the optimiser's state, and buffers between ranks.

    Under DeepSpeed in half precision the optimiser has fp32 weights of its own; under FSDP2 those
    that are divided are fp32, and what is gathered of them is not.

    Args:
        student: as it is computed, under DeepSpeed and FSDP2 in half precision where that is asked
            for.
    """
    params, trained = _unique(student.parameters()), _unique(student.parameters(), trained=True)
    half = half_dtype(training) if sharding.stage is not None else None
    weights, gradients = _bytes(params, half), _bytes(trained, half)
    number = _count(trained)
    optimizer = str(training.get("optim", "adamw")).split("_")[0]
    states = _STATE_BYTES.get(optimizer, 8) * number
    if half is not None and sharding.fsdp:
        weights += 4 * number - gradients
        gradients = 4 * number
    elif half is not None:
        states += 4 * number
    parts = []
    for name, part, size in (
        ("student", "parameters", weights),
        ("gradients", "gradients", gradients),
        ("optimizer", "optimizer", states),
    ):
        ranks = sharding.over(part)
        note = f"{size / 2**30:.1f} GiB over {ranks} ranks" if ranks > 1 else ""
        if part in sharding.offloads:
            parts.append(Part(name, 0, "in the memory of the host"))
        else:
            parts.append(Part(name, -(-size // ranks), note))
    if sharding.fsdp:
        return parts + (_groups_of_fsdp(student, training) if sharding.ranks > 1 else [])
    if sharding.ranks > 1:
        bucket = gradients if sharding.stage is None else 2 * min(sharding.bucket, number)
        parts.append(Part("buckets", bucket, "gradients on their way between ranks"))
    if sharding.over("parameters") > 1:
        whole = min(sharding.live, _count(params)) * weights // max(_count(params), 1)
        parts.append(Part("gathered", whole, "parameters that are whole at once"))
    return parts


def _groups_of_fsdp(student: nn.Module, training: Mapping[str, Any]) -> list[Part]:
    """What FSDP2 has whole at once: each block is a group, the rest, with the head, another one."""
    parts = SplitCausalLM.of(student, "student")
    blocks = [*LayerTaps(parts.backbone, "student").blocks]
    everything = bytes_of(student)
    rest = everything - sum(map(bytes_of, blocks))
    stays = (training.get("fsdp_config") or {}).get("reshard_after_forward") is False
    whole = everything if stays else rest + 2 * max(map(bytes_of, blocks))
    trained = [_count(_unique(block.parameters(), trained=True)) for block in blocks]
    number = _count(_unique(student.parameters(), trained=True))
    if training.get("gradient_accumulation_steps", 1) > 1:
        # accelerate sums them over ranks once a step, and each rank has all of them until then
        sums, note = 4 * number, "gradients of the micro-batches so far, whole in fp32"
    else:
        sums = 4 * max(2 * max(trained), number - sum(trained))
        note = "gradients of two groups on their way between ranks"
    return [
        Part("gathered", whole, "two blocks and the rest, or all that is not let go"),
        Part("sums", sums, note),
    ]


def _unique(params: Iterable[nn.Parameter], trained: bool = False) -> list[nn.Parameter]:
    kept = {id(param): param for param in params if param.requires_grad or not trained}
    return list(kept.values())


def _count(params: Iterable[Tensor]) -> int:
    return sum(param.numel() for param in params)


def _bytes(params: Iterable[Tensor], dtype: torch.dtype | None = None) -> int:
    return sum(param.numel() * (dtype or param.dtype).itemsize for param in params)


def bytes_of(module: nn.Module) -> int:
    """Of its parameters."""
    return _bytes(_unique(module.parameters()))

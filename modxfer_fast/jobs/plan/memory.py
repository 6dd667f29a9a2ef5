"""Bytes of each rank, part by part, from shapes alone."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from modxfer_fast.engine import deepspeed

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
    """

    ranks: int
    stage: int | None = None
    offloads: tuple[str, ...] = ()
    bucket: int = _BUCKET
    live: int = _LIVE

    @classmethod
    def of(cls, training: Mapping[str, Any], ranks: int) -> "Sharding":
        """As the `training` section of a job says."""
        given = training.get("deepspeed")
        zero = deepspeed.load_config(given).get("zero_optimization", {}) if given else {}
        stage = training.get("zero_stage")
        if stage is None and given:
            stage = zero.get("stage", 0)
        if training.get("fsdp"):
            stage = 3  # what FSDP2 divides
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

    Under DeepSpeed in half precision the optimiser has fp32 weights of its own.
    """
    params, trained = _unique(student.parameters()), _unique(student.parameters(), trained=True)
    half = half_dtype(training) if sharding.stage is not None else None
    weights, gradients = _bytes(params, half), _bytes(trained, half)
    number = _count(trained)
    optimizer = str(training.get("optim", "adamw")).split("_")[0]
    states = (_STATE_BYTES.get(optimizer, 8) + (0 if half is None else 4)) * number
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
    if sharding.ranks > 1:
        bucket = gradients if sharding.stage is None else 2 * min(sharding.bucket, number)
        parts.append(Part("buckets", bucket, "gradients on their way between ranks"))
    if sharding.over("parameters") > 1:
        whole = min(sharding.live, _count(params)) * weights // max(_count(params), 1)
        parts.append(Part("gathered", whole, "parameters that are whole at once"))
    return parts


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

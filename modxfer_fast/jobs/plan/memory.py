"""Bytes of each rank, part by part, from shapes alone."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from modxfer_fast.engine import deepspeed
from modxfer_fast.engine.features.taps import LayerTaps
from modxfer_fast.engine.students.causal_lm import SplitCausalLM
from modxfer_fast.jobs.sharding import Sharding

_STATE_BYTES = {"sgd": 0, "adafactor": 0, "lion": 4}  # of a parameter in fp32; else Adam's two


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

    Under DeepSpeed the optimiser has fp32 weights of its own, but at stage 0 in fp32; under FSDP2
    in half precision those that are divided are fp32, and what is gathered of them is not.

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
    has_copies = sharding.stage is not None and (half is not None or sharding.stage >= 1)
    if half is not None and sharding.fsdp:
        weights += 4 * number - gradients
        gradients = 4 * number
    elif has_copies and not sharding.fsdp:
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
        parts.append(
            Part(
                "buckets",
                _buckets(sharding, gradients, number),
                "gradients on their way between ranks",
            )
        )
    if sharding.over("parameters") > 1:
        whole = min(sharding.live, _count(params)) * weights // max(_count(params), 1)
        parts.append(Part("gathered", whole, "parameters that are whole at once"))
    return parts


def _buckets(sharding: Sharding, gradients: int, number: int) -> int:
    """Bytes of what goes between ranks: copies of all gradients, or of what DeepSpeed takes."""
    if sharding.stage is None or not number:
        return gradients
    itemsize = gradients // number
    bucket = min(deepspeed.BUCKET, number) if sharding.bucket is None else sharding.bucket
    if sharding.stage == 0:  # not allocated before there are gradients
        return itemsize * min(bucket, number)
    return sharding.buckets * itemsize * bucket


def step_beside(parts: Iterable[Part], sharding: Sharding, step: int) -> int:
    """Bytes of a step beyond `parts`, some of which come when most of the others have gone.

    Args:
        step: of the micro-batch, with the gradients that it makes unless they stand.
    """
    if sharding.accumulation > 1 or sharding.fsdp:
        return step
    of = {part.name: part.bytes for part in parts}
    later = of["gradients"]
    if sharding.stage == 0:
        later += of.get("buckets", 0)
    return max(step - later, 0)


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

"""How the `training` section of a job divides the student over its processes."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from modxfer_fast.engine import deepspeed

_LIVE = 1_000_000_000  # DeepSpeed's default, elements


@dataclasses.dataclass(frozen=True)
class Sharding:
    """How a student is divided.

    Attributes:
        ranks: processes of the job.
        stage: of ZeRO, None without DeepSpeed.
        offloads: what stays in the memory of the host, of "optimizer" and "parameters".
        accumulation: micro-batches of an optimiser step.
        bucket: elements of DeepSpeed's bucket of gradients, None for those of all, up to BUCKET.
        buckets: how many of them there are.
        live: elements of parameters that may be whole at once under ZeRO-3.
        fsdp: whether FSDP2 divides it, which shares what stage 3 shares.
    """

    ranks: int
    stage: int | None = None
    offloads: tuple[str, ...] = ()
    accumulation: int = 1
    bucket: int | None = None
    buckets: int = 1
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
        accumulation = training.get("gradient_accumulation_steps", 1)
        if training.get("fsdp"):
            return cls(ranks, 3, accumulation=accumulation, fsdp=True)
        keys = {"optimizer": "offload_optimizer", "parameters": "offload_param"}
        offloads = tuple(
            name for name, key in keys.items() if zero.get(key, {}).get("device", "none") != "none"
        )
        bucket, live = (
            value if isinstance(value := zero.get(key), int) else None
            for key in ("reduce_bucket_size", "stage3_max_live_parameters")
        )
        # stage 1 lets the last step's go late, stage 3 copies what it scatters
        buckets = 2 if stage in (1, 3) or (stage == 2 and zero.get("overlap_comm")) else 1
        return cls(ranks, stage, offloads, accumulation, bucket, buckets, live or _LIVE)

    @property
    def gradients_stand(self) -> bool:
        """Whether a step makes none beside what parts_of_student counts: they were there, or go
        into a bucket as they come."""
        return self.accumulation > 1 or (self.stage or 0) >= 2

    def over(self, part: str) -> int:
        """Ranks that share a part: "optimizer", "gradients" or "parameters"."""
        least = {"optimizer": 1, "gradients": 2, "parameters": 3}[part]
        return self.ranks if self.stage is not None and self.stage >= least else 1

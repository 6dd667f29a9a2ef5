"""`training` sections and loss options -> `DistillConfig`."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers.integrations import integration_utils

from modxfer_fast.config import ConfigError, LossSection, OnPolicySection, check_fields
from modxfer_fast.config.errors import nearest
from modxfer_fast.config.fields import built
from modxfer_fast.engine import DistillConfig, deepspeed
from modxfer_fast.engine.tasks.trainer import FOR_EVALUATION
from modxfer_fast.jobs.distill.hub import check_hub
from modxfer_fast.jobs.ranks import is_main
from modxfer_fast.kernels import dispatch

_OWNED = {
    "output_dir": "output_dir",
    "seed": "seeds",
    "kind": "kind",
    "on_policy": "the on_policy section",
    **dict.fromkeys(("hub_strategy", "hub_always_push"), "the job, which sends what is finished"),
    **dict.fromkeys((*LossSection.model_fields, "loss_impl"), "the loss section"),
}
_SHARDING = ("deepspeed", "zero_stage")


def check_training(section: dict[str, Any], where: str, *, pretrain: bool = False) -> None:
    """Raise a ConfigError unless `section` can become a DistillConfig that can run here.

    Args:
        section: fields of DistillConfig. pretrain: whether `seed` is among what it may hold.
    """
    owned = {key: by for key, by in _OWNED.items() if not (pretrain and key == "seed")}
    if pretrain:
        owned["push_to_hub"] = "training"
    check_fields(DistillConfig, section, where, owned)
    plain = {key: value for key, value in section.items() if key not in _SHARDING}
    args = built(DistillConfig, where, output_dir="unused", **plain)
    if any(section.get(key) is not None for key in _SHARDING):
        _check_deepspeed(section, where)
    if "report_to" in section:
        _check_loggers(args.report_to, f"{where}.report_to")
    if args.push_to_hub and is_main():  # a thousand ranks that ask at once are refused
        check_hub(args.hub_token, f"{where}.push_to_hub")


def check_best_metric(name: str | None, losses: Iterable[LossSection], has_logits: bool) -> None:
    """Raise a ConfigError unless the figure that tells the best checkpoint is measured in the runs
    that minimise these losses.

    Args:
        has_logits: whether students are causal language models.
    """
    if name is None:
        return
    for loss in losses:
        known = ["loss", *(("kd", "ce", "perplexity") if has_logits else ())]
        known += ["hidden_loss", "hidden_cosine"] if loss.hidden_states else []
        known += ["relation_loss"] if loss.relations else []
        own = name.removeprefix("eval_")
        terms = [stem for stem in ("hidden_", "relation_") if f"{stem}loss" in known]
        if own not in known and not own.startswith(tuple(terms)):  # a pair of layers has a name too
            raise ConfigError(
                f"training.metric_for_best_model: expected what each run measures, "
                f"{', '.join(known)}, got {name}"
            )


def check_backends(loss: LossSection, device: torch.device, has_logits: bool) -> None:
    """Raise a ConfigError unless the kernels of a loss have a backend on `device`."""
    hidden = loss.hidden_states
    used = {
        "loss": ("linear_kd_loss", has_logits and loss.impl == "fused" and loss),
        "loss.hidden_states": ("projection_loss", hidden and hidden.impl == "fused" and hidden),
        "loss.relations": ("relation_loss", loss.relations),
    }
    for where, (room, section) in used.items():
        try:
            if section:
                dispatch.resolve(room, torch.empty(0, device=device), backend=section.backend)
        except dispatch.BackendError as error:
            raise ConfigError(f"{where}.backend: {error}") from error


def _check_deepspeed(section: dict[str, Any], where: str) -> None:
    """What DeepSpeed would raise once the models are there; it is not started here."""
    try:
        if section.get("deepspeed") is not None:
            deepspeed.check_config(deepspeed.load_config(section["deepspeed"]))
        if section.get("zero_stage") is not None:
            deepspeed.zero_config(section["zero_stage"])
        deepspeed.check_environment()
    except (OSError, RuntimeError, ValueError, ImportError) as error:
        raise ConfigError(f"{where}: {error}") from error


def _check_loggers(names: list[str], where: str) -> None:
    known = integration_utils.INTEGRATION_TO_CALLBACK
    for name in names:
        if name not in known:
            raise ConfigError(f"{where}: unknown logger {name!r}{nearest(name, known)}")
        if name not in integration_utils.get_available_reporting_integrations():
            raise ConfigError(f"{where}: {name} is not installed; pip install {name}")


def training_args(
    section: dict[str, Any],
    where: str,
    output_dir: Path,
    loss: LossSection,
    *,
    seed: int,
    kind: str = "causal_lm",
    on_policy: OnPolicySection | None = None,
) -> DistillConfig:
    quiet = {"report_to": "none", "disable_tqdm": True, "seed": seed}
    of_loss = loss.model_dump()
    of_loss["loss_impl"] = of_loss.pop("impl")
    of_job = {"output_dir": str(output_dir), "kind": kind, "push_to_hub": False}
    fields = {**quiet, **section, **of_loss, **of_job}
    if on_policy is not None:
        fields["on_policy"] = on_policy.model_dump()
    return built(DistillConfig, where, **fields)


def of_processes(section: dict[str, Any], began: int, now: int) -> dict[str, Any]:
    """`section` with which `now` processes take as many rows a step as `began` did.

    Raises:
        ConfigError: they cannot.
    """
    if began == now:
        return section
    accumulated = "gradient_accumulation_steps"
    batches = section.get(accumulated, 1) * began
    if batches % now:
        raise ConfigError(
            f"--resume: expected a number of processes that divides {batches}, the micro-batches "
            f"of a step of this run, which began with {began} processes; got {now}"
        )
    return {**section, accumulated: batches // now}


def evaluation_args(
    section: dict[str, Any],
    output_dir: Path,
    loss: LossSection,
    *,
    seed: int = 0,
    kind: str = "causal_lm",
) -> DistillConfig:
    """Arguments for evaluating with the precision and batch size of `section`, unsharded.

    seed: that fresh projections start from, as in the training run of that seed.
    """
    kept = {key: section[key] for key in FOR_EVALUATION if key in section}
    kept["stall_timeout_s"] = None  # which is of training, and bounded by ddp_timeout
    return training_args(kept, "training", output_dir, loss, seed=seed, kind=kind)

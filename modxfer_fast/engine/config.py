"""Options of a distillation run: everything of TrainingArguments, and the loss."""
# ruff: noqa: RUF009  `_option` makes a field

import json
import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.trainer_utils import IntervalStrategy
from transformers.utils import logging

from modxfer_fast.config import HiddenStatesSection, OnPolicySection, RelationsSection
from modxfer_fast.config.loading import validate
from modxfer_fast.config.loss import FeaturesSection, check_learns
from modxfer_fast.config.section import Section
from modxfer_fast.engine import deepspeed, fsdp
from modxfer_fast.engine.objective import Objective
from modxfer_fast.engine.ranges import check_at_least, check_ranges
from modxfer_fast.engine.students import student_of_kind
from modxfer_fast.kernels.common.spec import MADE, OF_MODELS
from modxfer_fast.kernels.divergences import ALPHAS, BETAS, FORMULAS

logger = logging.get_logger(__name__)

# Switches of TrainingArguments that must be off, and why.
_UNSUPPORTED = {
    "label_smoothing_factor": "the fused loss has no smoothing",
    "save_only_model": "a resumed run would begin with a new optimizer and schedule, unannounced",
    "use_liger_kernel": "it replaces the student's forward",
    "fp16_full_eval": "it would cast the weights that train",
    "bf16_full_eval": "it would cast the weights that train",
    "remove_unused_columns": "it removes columns of the collator",
}


_LEAST = {
    "max_skipped_steps": 0,
    "keep_nonfinite_steps": 0,
    "eval_samples": 0,
    "eval_sample_tokens": 1,
}


class _OnPolicy(Section):
    """So that messages name the whole key."""

    on_policy: OnPolicySection


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class DistillConfig(TrainingArguments):
    """TrainingArguments plus the loss and the ZeRO stage; their names follow `linear_kd_loss`.

    Under ZeRO-3 a configuration must exist before the student is loaded, which is then partitioned
    while it loads. The teacher may be loaded before or after.

    Raises:
        ValueError: an option out of range, or one of TrainingArguments that the engine cannot
            honour.
    """

    kind: str = _option(
        "causal_lm",
        "causal_lm; encoder: no logits, learned by hidden_states; or classifier, of tokens or "
        "sequences.",
    )
    divergence: str = _option(
        Objective.divergence,
        f"Of p, the teacher, and q, the student: {FORMULAS}. In Python also weights of several, by "
        "name.",
    )
    alpha: float | None = _option(
        Objective.alpha, f"Of the divergences that read it; when not given, {ALPHAS}."
    )
    beta: float | None = _option(
        Objective.beta, f"Of the divergences that read it; when not given, {BETAS}."
    )
    temperature: float = _option(
        Objective.temperature, "Divides both rows of logits inside the divergence."
    )
    kd_weight: float | None = _option(
        None, "Factor of the divergence; 1 when not given, 0 for encoders."
    )
    ce_weight: float = _option(Objective.ce_weight, "Factor of the cross entropy.")
    label_smoothing: float = _option(
        Objective.label_smoothing, "Share of the label's probability that goes to all classes."
    )
    z_loss_weight: float = _option(
        Objective.z_loss_weight, "Factor of (log sum exp of the student's logits) squared."
    )
    scale_by_temperature_squared: bool = _option(
        Objective.scale_by_temperature_squared, "Multiply the divergence by temperature squared."
    )
    workspace_mb: int | None = _option(
        Objective.workspace_mb,
        "Memory of the fused loss for logits in flight, in MiB; 256 when not given, on a GPU 512 "
        "and at least what 1024 tokens take.",
    )
    backend: str | None = _option(
        Objective.backend, "Kernel backend of the fused loss; chosen when not given."
    )
    gradients: str = _option(
        Objective.gradients,
        "forward: of the fused loss, made beside it; recompute: in the backward, for less memory.",
    )
    filter_eps: float | None = _option(
        Objective.filter_eps,
        "Leave classes out of the fused loss's gradients whose own are below it, times the token's "
        "factor in the loss.",
    )
    loss_impl: str = _option(
        Objective.impl, "fused, or dense: whole logits in plain PyTorch, to compare."
    )
    hidden_states: dict | None = _option(
        None, "Fields of HiddenStatesSection: a loss of mapped layers."
    )
    relations: dict | None = _option(
        None, "Fields of RelationsSection: a loss of attention relations."
    )
    on_policy: dict | None = _option(
        None, "Fields of OnPolicySection: training on what the student writes."
    )
    eval_samples: int = _option(
        0,
        "Held-out prompts that student and teacher complete at each evaluation, written to "
        "samples.jsonl and shown.",
    )
    eval_sample_tokens: int = _option(64, "Tokens of such a completion, at most.")
    zero_stage: int | None = _option(None, "Run under DeepSpeed with this ZeRO stage, 0 to 3.")
    fsdp: Any = _option(
        None, "true: run under PyTorch's FSDP2 instead, `fully_shard`; see fsdp_config."
    )
    early_stopping_patience: int | None = _option(
        None,
        "End training when metric_for_best_model, loss where not given, has not improved in so "
        "many evaluations.",
    )
    early_stopping_threshold: float = _option(
        0.0, "By how much it has to be better to have improved."
    )
    max_skipped_steps: int = _option(10, "Updates in a row that may be skipped as not finite.")
    keep_nonfinite_steps: int = _option(
        3,
        "Skipped steps of which the first broken tensor is named, and which are kept for `modxfer "
        "replay`; of several in a row the first.",
    )
    stall_timeout_s: float | None = _option(
        1500.0,
        "Seconds after which training ends when no rank has moved, told where each is; None to "
        "wait for as long as torch does.",
    )
    # the collator emits num_valid, which is no argument of the student
    remove_unused_columns: bool = _option(False, "Must stay False.")
    # the filter waits for the device in each micro-batch; the guard looks once an update
    logging_nan_inf_filter: bool = _option(False, "See max_skipped_steps.")

    def __post_init__(self):
        student = student_of_kind(self.kind)
        self._features()
        student.settle(self)
        if student.has_logits:
            weights = (self.kd_weight, self.ce_weight, self.z_loss_weight)
            check_learns(weights, self._has_features)
        self.objective()
        self.on_policy_options()
        self._refuse_unsupported()
        if not torch.accelerator.is_available():
            self.use_cpu = True
        if self.ddp_find_unused_parameters is None:
            # every trainable parameter takes part in the loss; the search would forbid
            # checkpointing
            self.ddp_find_unused_parameters = False
        if self.data_seed is None:
            # else the order would follow whatever seeded torch last, and a resumed run lose its
            # place
            self.data_seed = self.seed
        self._settle_early_stopping()
        self._check_fsdp()
        self._prepare_deepspeed()
        super().__post_init__()
        self._settle_batches()
        if self.n_gpu > 1:
            logger.warning(
                f"{self.n_gpu} GPUs are visible to one process, one of them is used; "
                "start with torchrun to use all"
            )
            self._n_gpu = 1

    def objective(self) -> Objective | None:
        """The loss of the logits that the options describe; None for encoders, which have none."""
        if not student_of_kind(self.kind).has_logits:
            return None
        names = {option.name for option in fields(Objective)} - {"impl", *MADE, *OF_MODELS}
        return Objective(**{name: getattr(self, name) for name in names}, impl=self.loss_impl)

    def hidden_state_options(self) -> HiddenStatesSection | None:
        """The loss of hidden states that `hidden_states` describes."""
        return self._features().hidden_states

    def relation_options(self) -> RelationsSection | None:
        """The loss of attention relations that `relations` describes."""
        return self._features().relations

    def on_policy_options(self) -> OnPolicySection | None:
        """The on-policy training that `on_policy` describes.

        Raises:
            ValueError: an option out of range, or a student or loss that cannot learn by it.
        """
        if self.on_policy is None:
            return None
        options = validate({"on_policy": self.on_policy}, _OnPolicy, "").on_policy
        if self.kind != "causal_lm":
            raise ValueError(f"on_policy: expected kind causal_lm, which writes, got {self.kind}")
        if not self.kd_weight and not self._has_features:
            raise ValueError(
                "on_policy: expected a kd_weight above 0, because the teacher alone says what is "
                f"right in a text of the student, got {self.kd_weight}"
            )
        return options

    @property
    def _has_features(self) -> bool:
        return self.hidden_states is not None or self.relations is not None

    def _features(self) -> FeaturesSection:
        given = {"hidden_states": self.hidden_states, "relations": self.relations}
        return validate(given, FeaturesSection, "")

    def _refuse_unsupported(self) -> None:
        check_ranges(self)
        check_at_least(self, _LEAST)
        if self.eval_samples and self.kind != "causal_lm":
            raise ValueError(
                f"eval_samples: expected 0 with kind {self.kind}, which writes no text, got "
                f"{self.eval_samples}"
            )
        if not self.average_tokens_across_devices:
            raise ValueError(
                "average_tokens_across_devices: expected True; without it a rank with few tokens "
                "weighs as much as one with many"
            )
        if self.stall_timeout_s is not None and not self.stall_timeout_s > 0:
            raise ValueError(f"stall_timeout_s: expected > 0, got {self.stall_timeout_s}")
        if self.stall_timeout_s is not None and self.stall_timeout_s >= self.ddp_timeout:
            raise ValueError(
                f"stall_timeout_s: expected less than ddp_timeout, {self.ddp_timeout}, after which "
                "torch ends ranks without a word about the others, or null, got "
                f"{self.stall_timeout_s:g}"
            )
        for name, reason in _UNSUPPORTED.items():
            if value := getattr(self, name):
                raise ValueError(f"{name}: expected it off, got {value!r}; {reason}")

    @property
    def rows_per_step(self) -> int:
        """Of an update, over all ranks and micro-batches."""
        return self.train_batch_size * self.gradient_accumulation_steps * self.world_size

    def _settle_batches(self) -> None:
        batches: Any = self.accelerator_config
        if batches.dispatch_batches is None:
            # the first rank cannot cut batches that hold counts; each rank reads its own instead
            batches.dispatch_batches = False
        for name, expected, reason in (
            ("split_batches", False, "a batch is that of one rank"),
            ("even_batches", True, "a rank with fewer batches would leave the others waiting"),
        ):
            if (value := getattr(batches, name)) != expected:
                raise ValueError(
                    f"accelerator_config.{name}: expected {expected}, got {value!r}; {reason}"
                )

    def _settle_early_stopping(self) -> None:
        if self.early_stopping_patience is not None:
            if self.early_stopping_patience < 1:
                raise ValueError(
                    f"early_stopping_patience: expected >= 1, got {self.early_stopping_patience}"
                )
            if self.eval_strategy in ("no", IntervalStrategy.NO):
                raise ValueError(
                    "eval_strategy: expected steps or epoch beside early_stopping_patience, got "
                    f"{self.eval_strategy!r}"
                )
            self.metric_for_best_model: str | None = self.metric_for_best_model or "loss"
        if self.greater_is_better is None and self.metric_for_best_model is not None:
            # transformers takes whatever does not end in `loss`, a divergence, for a gain
            self.greater_is_better: bool | None = "cosine" in self.metric_for_best_model

    def _check_fsdp(self) -> None:
        if not self.fsdp:
            if fsdp.launcher_asks():
                raise ValueError(
                    "fsdp: expected true, because `accelerate launch --use_fsdp` asks for it, got "
                    f"{self.fsdp!r}"
                )
            if self.fsdp_config:
                raise ValueError(f"fsdp: expected true beside fsdp_config, got {self.fsdp!r}")
            return
        for name in ("zero_stage", "deepspeed"):
            if (value := getattr(self, name)) is not None:
                raise ValueError(f"{name}: expected nothing beside fsdp, got {value!r}")
        if self.eval_samples:
            raise ValueError(
                "eval_samples: expected 0 beside fsdp, because one process alone writes them, got "
                f"{self.eval_samples}"
            )
        if self.fp16:
            raise ValueError("fp16: expected bf16 beside fsdp, whose sums no loss scaler looks at")
        config = self.fsdp_config or {}
        if isinstance(config, str):
            config = json.loads(Path(config).read_text(encoding="utf-8"))
        fsdp.check_config(config)
        self.fsdp_config: Any = dict(config)  # transformers writes into it
        fsdp.check_environment()
        fsdp.take_launcher_switch()

    def _prepare_deepspeed(self) -> None:
        unset_hf_deepspeed_config()  # an earlier trainer of this process may have left one
        if self.zero_stage is not None:
            config = deepspeed.zero_config(self.zero_stage)
            if self.deepspeed is None:
                self.deepspeed: Any = config
        if self.deepspeed is not None:
            config = deepspeed.load_config(self.deepspeed)
            deepspeed.check_config(config)
            stage = config.get("zero_optimization", {}).get("stage", 0)
            if self.zero_stage not in (None, stage):
                raise ValueError(
                    f"zero_stage: expected {stage}, as in `deepspeed`, got {self.zero_stage}"
                )
        launcher_asks = os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true"
        if self.deepspeed is not None or launcher_asks:
            if deepspeed.take_cpu_switch():
                self.use_cpu = True
            deepspeed.check_environment()
            deepspeed.start(self.use_cpu, self.ddp_timeout)
        if self.deepspeed is not None:
            deepspeed.check_keys(config)

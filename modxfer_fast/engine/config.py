"""Options of a distillation run: everything of TrainingArguments, and the loss."""

import os
from dataclasses import dataclass, field, fields

import torch
from transformers import TrainingArguments
from transformers.utils import logging

from modxfer_fast.engine import deepspeed
from modxfer_fast.engine.features.options import HiddenStateOptions, RelationOptions, parse_options
from modxfer_fast.engine.objective import Objective
from modxfer_fast.engine.students.kinds import student_of_kind
from modxfer_fast.kernels.divergences import FORMULAS, WITH_BETA

logger = logging.get_logger(__name__)


@dataclass
class DistillConfig(TrainingArguments):
    """TrainingArguments plus the loss and the ZeRO stage; their names follow `linear_kd_loss`.

    Under ZeRO-3 a configuration must exist before the student is loaded, which is then partitioned
    while it loads. The teacher may be loaded before or after.

    Raises:
        ValueError: an option out of range, or one of TrainingArguments that the engine cannot
            honour.
    """

    kind: str = field(
        default="causal_lm",
        metadata={
            "help": "causal_lm; encoder: no logits, learned by hidden_states; or classifier, of "
            "tokens or sequences."
        },
    )
    divergence: str = field(
        default="forward_kl",
        metadata={"help": f"Of p, the teacher, and q, the student: {FORMULAS}."},
    )
    beta: float | None = field(
        default=None,
        metadata={"help": f"Weight of p, for {WITH_BETA} alone; 0.5 when not given."},
    )
    temperature: float = field(
        default=1.0, metadata={"help": "Divides both rows of logits inside the divergence."}
    )
    kd_weight: float | None = field(
        default=None,
        metadata={"help": "Factor of the divergence; 1 when not given, 0 for encoders."},
    )
    ce_weight: float = field(default=0.0, metadata={"help": "Factor of the cross entropy."})
    scale_by_temperature_squared: bool = field(
        default=False, metadata={"help": "Multiply the divergence by temperature squared."}
    )
    workspace_mb: int = field(
        default=512, metadata={"help": "Memory of the fused loss for logits in flight, in MiB."}
    )
    backend: str | None = field(
        default=None, metadata={"help": "Kernel backend of the fused loss; chosen when not given."}
    )
    loss_impl: str = field(
        default="fused",
        metadata={"help": "fused, or dense: whole logits in plain PyTorch, to compare."},
    )
    hidden_states: dict | None = field(
        default=None, metadata={"help": "Fields of HiddenStateOptions: a loss of mapped layers."}
    )
    relations: dict | None = field(
        default=None, metadata={"help": "Fields of RelationOptions: a loss of attention relations."}
    )
    zero_stage: int | None = field(
        default=None, metadata={"help": "Run under DeepSpeed with this ZeRO stage (0, 1, 2 or 3)."}
    )
    max_skipped_steps: int = field(
        default=10, metadata={"help": "Updates in a row that may be skipped as not finite."}
    )
    # the collator emits num_valid, which is no argument of the student
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay False."})
    # the filter waits for the device in each micro-batch; the guard looks once an update
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "See max_skipped_steps."})

    def __post_init__(self):
        student = student_of_kind(self.kind)
        self.relation_options()
        student.settle(self)
        self.objective()
        self.hidden_state_options()
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
        self._prepare_deepspeed()
        super().__post_init__()
        if self.accelerator_config.dispatch_batches is None:
            # the first rank cannot cut batches that hold counts; each rank reads its own instead
            self.accelerator_config.dispatch_batches = False
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
        names = [option.name for option in fields(Objective) if option.name != "impl"]
        return Objective(**{name: getattr(self, name) for name in names}, impl=self.loss_impl)

    def hidden_state_options(self) -> HiddenStateOptions | None:
        """The loss of hidden states that `hidden_states` describes."""
        return parse_options(HiddenStateOptions, self.hidden_states, "hidden_states")

    def relation_options(self) -> RelationOptions | None:
        """The loss of attention relations that `relations` describes."""
        return parse_options(RelationOptions, self.relations, "relations")

    def _refuse_unsupported(self) -> None:
        if self.max_skipped_steps < 0:
            raise ValueError(f"max_skipped_steps: expected >= 0, got {self.max_skipped_steps}")
        for name in (
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected >= 1, got {getattr(self, name)}")
        if self.learning_rate < 0:
            raise ValueError(f"learning_rate: expected >= 0, got {self.learning_rate}")
        if not self.average_tokens_across_devices:
            raise ValueError(
                "average_tokens_across_devices: expected True; without it a rank with few tokens "
                "weighs as much as one with many"
            )
        for name, value, reason in (
            (
                "label_smoothing_factor",
                self.label_smoothing_factor,
                "the fused loss has no smoothing",
            ),
            (
                "save_only_model",
                self.save_only_model,
                "a resumed run would begin with a new optimizer and schedule, without a word",
            ),
            ("use_liger_kernel", self.use_liger_kernel, "it replaces the student's forward"),
            ("fsdp", self.fsdp, "the output head would be a DTensor; use zero_stage=3"),
            ("fp16_full_eval", self.fp16_full_eval, "it would cast the weights that train"),
            ("bf16_full_eval", self.bf16_full_eval, "it would cast the weights that train"),
            (
                "remove_unused_columns",
                self.remove_unused_columns,
                "it removes columns of the collator",
            ),
        ):
            if value:
                raise ValueError(f"{name}: expected it off, got {value!r}; {reason}")

    def _prepare_deepspeed(self) -> None:
        deepspeed.forget()
        if self.zero_stage is not None:
            config = deepspeed.zero_config(self.zero_stage)
            if self.deepspeed is None:
                self.deepspeed = config
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
            deepspeed.start(self.use_cpu)

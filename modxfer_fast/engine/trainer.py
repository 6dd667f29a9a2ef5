"""Hugging Face's Trainer, with its loop, launchers, logging and checkpoints, on the fused loss."""

import contextlib
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DeepSpeedSchedulerWrapper, DistributedType, broadcast_object_list
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer
from transformers.integrations.deepspeed import deepspeed_load_checkpoint
from transformers.trainer_utils import EvalLoopOutput, has_length, rotate_checkpoints

from modxfer_fast.engine import checkpoint, deepspeed
from modxfer_fast.engine.config import DistillConfig
from modxfer_fast.engine.features.projections import load_projections, save_projections
from modxfer_fast.engine.guard import NonFiniteError, StepGuard
from modxfer_fast.engine.labels import AlignedLabels, sample_start
from modxfer_fast.engine.metrics import IGNORE_INDEX, TrainingClock, peak_mem_mib
from modxfer_fast.engine.module import DistillModule
from modxfer_fast.engine.teachers.replica import Teacher
from modxfer_fast.models.checks import check_finite


class DistillTrainer(Trainer):
    """Distils `teacher` into `model`.

    Batches come from `data_collator` as {"input_ids", "labels"} [B, T], optionally with
    "attention_mask" and "position_ids" [B, T], which restart at every document of a packed row.
    Collators of transformers and TRL emit labels[t] = the token at position t; they are shifted
    here. One that has `labels_are_aligned = True`, as `CausalCollator`, emits labels[t] = the token
    after it, and may add the int "num_valid", the number of labels that are not -100.

    Logs, besides Trainer's: kd_loss and ce_loss (unweighted means over the supervised tokens since
    the last report), num_tokens (tokens that are not padding, over all ranks, since the start),
    tokens_per_s (evaluation and saving left out), peak_mem_mib, and skipped_steps where there are
    any; with losses inside the networks hidden_loss and relation_loss (weighted means over their
    own tokens) and each pair of layers, unweighted, as hidden_<student>_<teacher>. Collators may
    then tell the int "num_tokens", the tokens that are no padding.

    With args.kind "encoder" there are no logits: batches need no "labels", and the student learns
    from hidden states, and relations, of all tokens that are no padding.

    Args:
        model: student, PreTrainedModel or PeftModel.
        args: configuration; under ZeRO-3 made before `model` was loaded.
        teacher: frozen model, or a Teacher with its plan, or None for cross entropy alone. With
            kd_weight=0 it takes part in evaluation only.
        data_collator: see above.
        processing_class: tokenizer, saved with the student. It lets vocabularies of the two models
            be padded to different sizes: the classes that both have count.

    Raises:
        ValueError, TypeError: naming the argument.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        args: DistillConfig,
        teacher: PreTrainedModel | PeftModel | Teacher | None = None,
        train_dataset=None,
        eval_dataset=None,
        data_collator=None,
        processing_class=None,
        callbacks=None,
        optimizers=(None, None),
    ):
        if not isinstance(args, DistillConfig):
            raise TypeError(f"args: expected a DistillConfig, got {type(args).__name__}")
        if data_collator is None:
            raise TypeError("data_collator: expected a collator of input_ids and labels, got None")
        if args.kind != "encoder":
            data_collator = AlignedLabels(data_collator)
        # a processor of several modalities has a tokenizer and no length
        tokenizer = getattr(processing_class, "tokenizer", processing_class)
        num_tokens = len(tokenizer) if hasattr(tokenizer, "__len__") else None
        teacher = Teacher.of(teacher, args.kind, num_tokens)
        module = DistillModule(
            model,
            teacher,
            args.objective(),
            args.hidden_state_options(),
            args.relation_options(),
            seed=args.seed,
        )
        with deepspeed.contained_launch_flag():
            super().__init__(
                model=module,
                args=args,
                data_collator=data_collator,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                callbacks=callbacks,
                optimizers=optimizers,
            )
        if args.deepspeed and self.accelerator.distributed_type != DistributedType.DEEPSPEED:
            raise RuntimeError(
                f"deepspeed: asked for, but Accelerate set up {self.accelerator.distributed_type}"
            )
        if teacher is not None:
            teacher.to(args.device)
        self.clock = TrainingClock()
        self.guard = StepGuard(
            args.max_skipped_steps, module, self._sum_over_ranks, self._count_loss
        )
        self.add_callback(self.clock)
        self.add_callback(self.guard)
        self._num_tokens = 0
        self._num_tokens_in_batch = None
        self._resumed: checkpoint.CheckpointInfo | None = None
        self._teacher_is_checked = False

    @property
    def student(self) -> PreTrainedModel | PeftModel:
        return self.model.student

    @property
    def zero_stage(self) -> int | None:
        """The ZeRO stage, None without DeepSpeed."""
        plugin = self.accelerator.state.deepspeed_plugin
        return None if plugin is None else plugin.zero_stage

    def _sum_over_ranks(self, tensor: Tensor) -> Tensor:
        return self.accelerator.reduce(tensor, reduction="sum")

    # ---- training ----

    def train(self, resume_from_checkpoint=None, trial=None, ignore_keys_for_eval=None):
        """Trains, from a checkpoint folder, or from the last whole one of output_dir if True.

        A checkpoint of the last step is loaded and not trained on. With more max_steps than before
        the learning rate follows the schedule of the new ones from the step reached on.

        Raises:
            ValueError: no whole checkpoint there, a damaged one, or one written by another number
                of ranks or stage.
            ModelError: a weight of the teacher is not finite.
            NonFiniteError: too many updates in a row were not.
        """
        self._resumed = None
        if resume_from_checkpoint is True:
            resume_from_checkpoint = self._on_main(
                lambda: checkpoint.last_complete_checkpoint(self.args.output_dir)
            )
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"resume_from_checkpoint: no whole checkpoint in {self.args.output_dir}"
                )
        elif resume_from_checkpoint and not isinstance(
            resume_from_checkpoint, checkpoint.WholeCheckpoint
        ):
            checkpoint.read_marker(resume_from_checkpoint)
            self._on_main(lambda: checkpoint.check_files(resume_from_checkpoint))
        if resume_from_checkpoint:
            info = checkpoint.read_marker(resume_from_checkpoint)
            written = (info.world_size, info.zero_stage)
            if written != (self.args.world_size, self.zero_stage):
                raise ValueError(
                    f"resume_from_checkpoint: written by {info.world_size} ranks with "
                    f"zero_stage={info.zero_stage}, this run has {self.args.world_size} ranks with "
                    f"zero_stage={self.zero_stage}"
                )
            self._num_tokens = info.num_tokens
            self._resumed = info
        self.guard.restart(0 if self._resumed is None else self._resumed.skipped_steps)
        self._check_teacher()
        check_finite(self.student, "student")
        output = super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        return output._replace(training_loss=output.metrics["train_loss"])

    def _check_teacher(self) -> None:
        """Looks once, when it is on its device, at whether a frozen teacher is finite."""
        if self.model.teacher is not None and not self._teacher_is_checked:
            check_finite(self.model.teacher.model, "teacher")
            self._teacher_is_checked = True

    def _on_main(self, compute: Callable[[], Any]) -> Any:
        """What `compute` returns on the main process, on every process; its ValueError too."""
        outcome = [None, None]
        if self.args.process_index == 0:
            try:
                outcome[0] = compute()
            except ValueError as error:
                outcome[1] = error
        value, error = broadcast_object_list(outcome)
        if error is not None:
            raise error
        return value

    def _run_epoch(self, *args, **kwargs) -> None:
        # Trainer looks at max_steps after an update, and so does one more than asked for
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _loss_sum(self) -> float:
        """Sum of the losses of all updates of the run, also of those before it was resumed."""
        pending = self._sum_over_ranks(self._tr_loss) / self.args.world_size
        before = 0.0 if self._resumed is None else self._resumed.loss_sum
        return before + self._total_loss_scalar + pending.item()

    def _finalize_training(self, trial, num_train_samples, start_time):
        if self._resumed is not None:  # means and times of the whole run
            self._total_loss_scalar += self._resumed.loss_sum
            self._initial_global_step = 0
            start_time -= self._resumed.seconds
        return super()._finalize_training(trial, num_train_samples, start_time)

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        created = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if created:
            self._group_projections(optimizer)
            # DeepSpeed drops an empty group (LoRA has no biases or norms), schedulers then miscount
            optimizer.param_groups[:] = [g for g in optimizer.param_groups if g["params"]]
        return optimizer

    def _group_projections(self, optimizer: torch.optim.Optimizer) -> None:
        """Gives projections a group of their own where they have options of their own."""
        options = self.args.hidden_state_options()
        if options is None or (options.learning_rate is None and options.weight_decay is None):
            return
        projections = list(self.model.features.parameters())
        if not projections:
            return
        own = {id(param) for param in projections}
        for group in optimizer.param_groups:
            group["params"] = [param for param in group["params"] if id(param) not in own]
        group = {"params": projections}
        if options.learning_rate is not None:
            group["lr"] = options.learning_rate
        weight_decay = options.weight_decay
        group["weight_decay"] = self.args.weight_decay if weight_decay is None else weight_decay
        optimizer.add_param_group(group)

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        # resumed below: Trainer loads a DeepSpeed checkpoint strictly unless `self.model` is a
        # PeftModel
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        if resume_from_checkpoint is not None:
            if self.is_deepspeed_enabled:
                self._load_deepspeed_checkpoint(resume_from_checkpoint)
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
            self._load_scaler(resume_from_checkpoint)
            _follow_schedule(self.lr_scheduler)
        self.guard.engine = self.deepspeed
        if not self.zero_stage:
            self.guard.watch(self.optimizer)
        return prepared

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device):
        features = self.model.features
        self._num_tokens_in_batch = None
        if features is not None and features.needs_all_tokens and batch_samples:
            count = sum(_num_tokens(batch) for batch in batch_samples)
            count = torch.as_tensor(count, dtype=torch.float32).to(device)
            self._num_tokens_in_batch = self._sum_over_ranks(count)
        if self.args.kind == "encoder":  # no labels to count; None would divide the loss once more
            return self._num_tokens_in_batch
        return super()._get_num_items_in_batch(batch_samples, device)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = {name: value for name, value in inputs.items() if name != "num_samples"}
        if self._num_tokens_in_batch is not None:
            inputs = {**inputs, "num_tokens_in_batch": self._num_tokens_in_batch}
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def training_step(self, model, inputs, num_items_in_batch=None) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.guard.add_loss(loss)
        return torch.zeros_like(loss)  # it counts once its step is taken

    def _count_loss(self, loss: Tensor) -> None:
        self._tr_loss += loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # Trainer divides by all steps
        if "loss" in logs:
            logs["loss"] *= self.guard.steps_per_taken()
            logs.update(self._measurements())
        if "train_loss" in logs:
            steps = self.state.global_step - self._initial_global_step
            taken = steps - self.guard.skipped
            logs["train_loss"] *= steps / taken if taken else math.nan if steps else 1.0
        super().log(logs, start_time)

    def _measurements(self) -> dict[str, float]:
        sums = self.model.meter.totals(self._sum_over_ranks, self.args.device)
        self.model.meter.restart()
        seconds = self.clock.lap()
        self._num_tokens += int(sums["num_tokens"])
        measured = {}
        if sums["num_valid"]:
            if self.args.kd_weight:
                measured["kd_loss"] = sums["kd"] / sums["num_valid"]
            if self.args.ce_weight:
                measured["ce_loss"] = sums["ce"] / sums["num_valid"]
        measured |= self._feature_means(sums)
        measured["num_tokens"] = self._num_tokens
        measured["tokens_per_s"] = round(sums["num_tokens"] / seconds, 1)
        measured["peak_mem_mib"] = round(peak_mem_mib(self.args.device), 1)
        if self.guard.skipped:
            measured["skipped_steps"] = self.guard.skipped
        return measured

    def _feature_means(self, sums: dict[str, float]) -> dict[str, float]:
        return {name: sums[name] / sums[f"num_{name}"] for name in sums if sums.get(f"num_{name}")}

    # ---- evaluation ----

    def evaluation_loop(
        self,
        dataloader,
        description,
        prediction_loss_only=None,
        ignore_keys=None,
        metric_key_prefix="eval",
    ) -> EvalLoopOutput:
        """Means over the supervised tokens of the whole set: <prefix>_loss, _kd, _ce, _perplexity.

        With losses inside the networks also <prefix>_hidden_loss and the like, means over theirs,
        and <prefix>_hidden_cosine, over pairs, of projected states and the teacher's. Encoders have
        these alone.

        Each sample counts once, also one that the sampler repeats to give all ranks equal batches.

        Raises:
            ModelError: a weight of the teacher is not finite.
            NonFiniteError: what it answers with is not.
            ValueError: ranks repeat samples, and which of a batch these are cannot be told.
        """
        self._check_teacher()
        if self.args.world_size > 1 and not has_length(dataloader.dataset):
            raise ValueError(
                "eval_dataset: expected one with a length, which tells what samples ranks repeat"
            )
        paused = self.clock.pause()
        training_meter = self.model.meter
        self.model.meter = self.model.new_meter(evaluation=True)
        was_training = self.model.training
        self.model.eval()
        try:
            with self._evaluated_model() as model:
                for inputs in dataloader:
                    inputs = self._prepare_inputs(self._without_repeated_samples(inputs))
                    with torch.no_grad(), self.accelerator.autocast():
                        model(**inputs)
                    self.control = self.callback_handler.on_prediction_step(
                        self.args, self.state, self.control
                    )
            sums = self.model.meter.totals(self._sum_over_ranks, self.args.device)
        finally:
            self.model.meter = training_meter
            self.model.train(was_training)
            self.clock.resume(paused)
        metrics = self._evaluation_metrics(sums)
        return EvalLoopOutput(
            predictions=None,
            label_ids=None,
            metrics={f"{metric_key_prefix}_{name}": value for name, value in metrics.items()},
            num_samples=self.num_examples(dataloader),
        )

    def _evaluation_metrics(self, sums: dict[str, float]) -> dict[str, float]:
        if sums["nonfinite_teacher"]:
            raise NonFiniteError(
                "teacher: expected hidden states that are finite, got NaN or inf in "
                f"{sums['nonfinite_teacher']:.0f} batches of the evaluation though its weights are "
                "finite; a half-precision teacher may need bfloat16 or float32"
            )
        features = self._feature_means(sums)
        if sums["nonfinite"]:
            features = dict.fromkeys(features, math.nan)
        inside = sum(value for name, value in features.items() if name.endswith("_loss"))
        if self.model.objective is None:
            if not sums["num_tokens"]:
                raise ValueError("eval_dataset: expected at least one token, got none")
            return {"loss": inside, **features}
        if sums["nonfinite"]:
            kd = ce = math.nan
        elif not sums["num_valid"]:
            raise ValueError("eval_dataset: expected at least one label other than -100, got none")
        else:
            kd, ce = sums["kd"] / sums["num_valid"], sums["ce"] / sums["num_valid"]
        perplexity = math.exp(ce) if not ce > 700 else math.inf
        loss = self.model.objective.combine(kd, ce) + inside
        metrics = {"loss": loss, "ce": ce, "perplexity": perplexity, **features}
        if self.model.teacher is not None:
            metrics["kd"] = kd
        return metrics

    @contextlib.contextmanager
    def _evaluated_model(self) -> Iterator[nn.Module]:
        """What to call for evaluation, also before training, when there is no engine yet."""
        if self.deepspeed is not None:
            yield self.deepspeed
            return
        self.model.to(self.args.device)
        with deepspeed.gathered_on_call(self.model), self.model.gathered_head():
            yield self.model

    def _without_repeated_samples(self, inputs: dict) -> dict:
        inputs = dict(inputs)
        num_rows = inputs["input_ids"].shape[0]
        num_samples = inputs.pop("num_samples", num_rows)
        state = self.accelerator.gradient_state
        if self.args.world_size == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return inputs
        # of the last batches of all ranks, laid end to end, the first `remainder` samples are new
        num_new = max(state.remainder - self.args.process_index * self.args.eval_batch_size, 0)
        if num_new >= num_samples:
            return inputs
        if num_samples == num_rows or num_new == 0:
            repeated = slice(num_new, None)
        else:
            start = sample_start(inputs.get("position_ids"), num_new, num_samples)
            repeated = (slice(None), slice(start, None))
        if "labels" in inputs:
            labels = inputs["labels"].clone()
            labels[repeated] = IGNORE_INDEX
            inputs |= {"labels": labels, "num_valid": None}
        if self.model.features is not None:
            mask = inputs.get("attention_mask")
            mask = torch.ones_like(inputs["input_ids"]) if mask is None else mask.clone()
            mask[repeated] = 0
            inputs |= {"token_mask": mask.bool(), "num_tokens": None}
        return inputs

    # ---- saving and loading ----

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the student as its Auto class or PeftModel reads it. All ranks must call."""
        output_dir = output_dir or self.args.output_dir
        state = projections = None
        if self.zero_stage == 3:
            keep = self.args.should_save
            state = deepspeed.whole_state_dict(
                self.student, keep, only_trainable=isinstance(self.student, PeftModel)
            )
            if self.model.features is not None:
                projections = deepspeed.whole_state_dict(
                    self.model.features, keep, only_trainable=False
                )
        if self.args.should_save:
            if _internal_call:  # inside a checkpoint, which gets its marker when it is whole
                self._save(output_dir, state, projections)
            else:
                with checkpoint.atomic_folder(output_dir) as folder:
                    self._save(str(folder), state, projections)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(
        self,
        output_dir: str | None = None,
        state_dict: dict | None = None,
        projections: dict | None = None,
    ) -> None:
        self.student.save_pretrained(output_dir, state_dict=state_dict)
        if self.model.features is not None:
            save_projections(output_dir, self.model.features, projections)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(output_dir)

    def _save_checkpoint(self, model, trial) -> None:
        paused = self.clock.pause()
        run_dir = self._get_output_dir(trial)
        folder = Path(run_dir) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save and folder.exists():  # damaged, or of an interrupted run
            shutil.rmtree(folder)
        self.accelerator.wait_for_everyone()
        # older checkpoints go only once this one is whole
        pending = self.model.meter.totals(self._sum_over_ranks, self.args.device)
        num_tokens = self._num_tokens + int(pending["num_tokens"])
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        info = checkpoint.CheckpointInfo(
            self.state.global_step,
            self.args.world_size,
            self.zero_stage,
            num_tokens,
            self._loss_sum(),
            self.clock.since_begin() + (self._resumed.seconds if self._resumed else 0.0),
            self.guard.skipped,
        )
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                checkpoint.mark_complete(folder, info)
        except BaseException:  # a full disk
            if self.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=run_dir,
                save_total_limit=limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )
        self.accelerator.wait_for_everyone()  # whoever ends now leaves a whole checkpoint
        self.clock.resume(paused)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not (self.is_deepspeed_enabled and isinstance(self.student, PeftModel)):
            super()._save_optimizer_and_scheduler(output_dir)
            return
        # Trainer would write the frozen base model too, since `self.model` is no PeftModel
        self.model_wrapped.save_checkpoint(output_dir, exclude_frozen_parameters=True)
        if self.args.should_save and not isinstance(self.lr_scheduler, DeepSpeedSchedulerWrapper):
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, "scheduler.pt"))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model or self.student)
        if self.model.features is not None:
            load_projections(resume_from_checkpoint, self.model.features)

    def _load_deepspeed_checkpoint(self, folder: str) -> None:
        is_peft = isinstance(self.student, PeftModel)
        deepspeed_load_checkpoint(self.model_wrapped, folder, load_module_strict=not is_peft)

    def _load_best_model(self) -> None:
        if self.is_deepspeed_enabled:
            self._load_deepspeed_checkpoint(self.state.best_model_checkpoint)
        else:
            self._load_from_checkpoint(self.state.best_model_checkpoint)


def _follow_schedule(scheduler) -> None:
    """Gives the optimiser the learning rate of its schedule, which a longer run has changed.

    The optimiser's own state holds the one of the run that wrote it, often 0 at its end.
    """
    if not isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
        return
    groups = scheduler.optimizer.param_groups
    pairs = zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    scheduler._last_lr = [base * factor(scheduler.last_epoch) for base, factor in pairs]
    for group, rate in zip(groups, scheduler._last_lr, strict=True):
        group["lr"] = rate


def _num_tokens(batch: dict) -> Tensor | int:
    """Tokens of a micro-batch that are no padding."""
    if batch.get("num_tokens") is not None:
        return batch["num_tokens"]
    mask = batch.get("attention_mask")
    return batch["input_ids"].numel() if mask is None else mask.sum()

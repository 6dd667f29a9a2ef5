"""Hugging Face's Trainer, with its loop, launchers, logging and checkpoints, on the fused loss."""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import (
    DistributedType,
    gather_object,
    send_to_device,
)
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainerCallback, set_seed
from transformers.trainer_utils import EvalLoopOutput, has_length, rotate_checkpoints
from transformers.utils import logging

from modxfer_fast.data.row_stream import RowStream
from modxfer_fast.engine import (
    checkpoint,
    deepspeed,
    evaluation,
    fsdp,
    nonfinite,
    saving,
    watchdog,
)
from modxfer_fast.engine.checkpoint import CheckpointInfo
from modxfer_fast.engine.config import DistillConfig
from modxfer_fast.engine.early_stopping import EarlyStopping
from modxfer_fast.engine.features.projections import group_projections, load_projections
from modxfer_fast.engine.guard import StepGuard
from modxfer_fast.engine.main_rank import on_main
from modxfer_fast.engine.memory import CHECKPOINT, EVALUATION, PHASES, PeakMemory
from modxfer_fast.engine.metrics import TrainingClock, means
from modxfer_fast.engine.module import DistillModule
from modxfer_fast.engine.on_policy.of_trainer import on_policy_of
from modxfer_fast.engine.on_policy.rollouts import Rollouts
from modxfer_fast.engine.progress import here
from modxfer_fast.engine.resumption import goes_on_from
from modxfer_fast.engine.samples import SampleWriter
from modxfer_fast.engine.streaming import StreamLoader, StreamProgress
from modxfer_fast.engine.teachers.cached import ANSWERS, Answering
from modxfer_fast.engine.teachers.protocol import TeacherProtocol
from modxfer_fast.engine.teachers.replica import Teacher
from modxfer_fast.engine.teachers.self_teacher import SelfDistillation
from modxfer_fast.engine.teachers.several import self_teachers
from modxfer_fast.engine.unreported import Unreported
from modxfer_fast.models.checks import check_finite, refuse_nonfinite

logger = logging.get_logger(__name__)

READING = f"{CHECKPOINT}, reading it"  # a phase in which, as while it is written, bytes count


class DistillTrainer(Trainer):
    """Distils `teacher` into `model`.

    Batches come from `data_collator` as {"input_ids", "labels"} [B, T], optionally with
    "attention_mask" and "position_ids" [B, T], which restart at every document of a packed row.
    Collators of transformers and TRL emit labels[t] = the token at position t; they are shifted
    here. One that has `labels_are_aligned = True`, as `CausalCollator`, emits labels[t] = the token
    after it, and may add the int "num_valid", the number of labels that are not -100, and
    "token_weights" [B, T], the factor of each position's loss in training.

    Logs, besides Trainer's: kd_loss and ce_loss (unweighted means over the supervised tokens since
    the last report), num_tokens (tokens that are not padding, over all ranks, since the start),
    tokens_per_s (evaluation and saving left out), peak_mem_mib, and skipped_steps where there are
    any; with losses inside the networks hidden_loss and relation_loss (weighted means over their
    own tokens) and each pair of layers, unweighted, as hidden_<student>_<teacher>. Collators may
    then tell the int "num_tokens", the tokens that are no padding.

    With args.on_policy it also logs on_policy_share (of the micro-batches), completion_length (mean
    tokens), generation_s, generated_tokens_per_s, and tokens_per_s_without_generation.

    With args.kind "encoder" there are no logits: batches need no "labels", and the student learns
    from hidden states, and relations, of all tokens that are no padding. With "classifier" batches
    are those of students/classifier.py.

    Args:
        model: student, PreTrainedModel or PeftModel.
        args: configuration; under ZeRO-3 made before `model` was loaded.
        teacher: frozen model, or a Teacher, or several as `SeveralTeachers`, or what answers as one
            does (teachers/protocol.py), or `SelfDistillation` for the student's own network, or
            None for cross entropy alone. With kd_weight=0 it takes part in evaluation only.
        data_collator: see above.
        train_dataset: rows that `data_collator` reads; also a `RowStream`.
        processing_class: tokenizer, saved with the student. It lets vocabularies of the two models
            be padded to different sizes: the classes that both have count.
        rollouts: with args.on_policy, who writes the completions; None for the student itself, in
            this process or in the vLLM that `args.on_policy` names.

    Attributes:
        nonfinite_folder: where steps that were not finite are kept, in output_dir at first.

    Raises:
        ValueError, TypeError: naming the argument.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        args: DistillConfig,
        teacher: PreTrainedModel | PeftModel | TeacherProtocol | SelfDistillation | None = None,
        train_dataset=None,
        eval_dataset=None,
        data_collator=None,
        processing_class=None,
        callbacks=None,
        optimizers=(None, None),
        rollouts: Rollouts | None = None,
    ):
        if not isinstance(args, DistillConfig):
            raise TypeError(f"args: expected a DistillConfig, got {type(args).__name__}")
        if data_collator is None:
            raise TypeError("data_collator: expected a collator of input_ids and labels, got None")
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
            kind=args.kind,
        )
        with deepspeed.contained_launch_flag():
            super().__init__(
                model=module,
                args=args,
                data_collator=module.collator(data_collator),
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
        if module.teacher is not None:
            module.teacher.to(args.device)
        self.clock, self.memory = TrainingClock(), PeakMemory(args.device)
        self.guard = StepGuard(
            args.max_skipped_steps,
            module,
            self._sum_over_ranks,
            self._count_step,
            self._explain_skipped,
        )
        self.add_callback(self.clock)
        self.add_callback(self.memory)
        self.add_callback(self.guard)
        self.add_callback(_AtBegin(self._resume_report))
        self.on_policy = on_policy_of(
            args,
            module,
            tokenizer,
            num_tokens,
            rollouts,
            self.accelerator.autocast,
            self._whole_student,
        )
        self._stream: StreamLoader | None = None
        if isinstance(train_dataset, RowStream):
            args.ignore_data_skip = True  # a stream is resumed by its place
            self.add_callback(StreamProgress())
        self.add_callback(watchdog.ProgressMarks())
        if args.early_stopping_patience is not None:
            self.add_callback(
                EarlyStopping(args.early_stopping_patience, args.early_stopping_threshold)
            )
        if args.eval_samples:
            self.add_callback(
                SampleWriter(
                    module,
                    eval_dataset,
                    self.data_collator,
                    tokenizer,
                    args,
                    lambda: self.callback_handler.callbacks,
                    self.clock.paused,
                    self.accelerator.autocast,
                )
            )
        self.nonfinite_folder = Path(args.output_dir) / nonfinite.FOLDER
        self._num_tokens = 0
        self._in_batch: dict[str, Tensor] = {}
        self._batches: list[dict[str, Any]] = []  # of the step at hand
        self._random: dict[str, Tensor] = {}  # before it
        self._checkpoint: str | None = None  # that this run goes on from
        self._before = CheckpointInfo.of_beginning(args.world_size, self.zero_stage)
        self._teacher_is_checked = False

    def _whole_student(self) -> AbstractContextManager:
        """Inside, each rank has the student whole, and may call it as often as it likes."""
        if fsdp.is_sharded(self.model):  # the head is of the whole module's group
            return fsdp.whole(self.model)
        return deepspeed.whole(self.student)

    @property
    def student(self) -> PreTrainedModel | PeftModel:
        return self.model.student

    @property
    def zero_stage(self) -> int | None:
        """The ZeRO stage, None without DeepSpeed."""
        plugin = self.accelerator.state.deepspeed_plugin
        return None if plugin is None else plugin.zero_stage

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.args.fsdp:
            fsdp.settle(self.accelerator, self.args.fsdp_plugin_args)
            self.is_fsdp_enabled = True

    def _sum_over_ranks(self, tensor: Tensor) -> Tensor:
        return self.accelerator.reduce(tensor, reduction="sum")

    # ---- training ----

    def train(self, resume_from_checkpoint=None, trial=None, ignore_keys_for_eval=None):
        """Trains, from a checkpoint folder, or from the last whole one of output_dir if True.

        Another number of ranks than wrote the checkpoint may go on, under ZeRO through DeepSpeed's
        universal form of it. A checkpoint of the last step is loaded and not trained on. With more
        max_steps than before the learning rate follows the schedule of the new ones from the step
        reached on.

        Raises:
            ValueError: no whole checkpoint there, a damaged one, one of another stage, or one of
                another number of ranks that DeepSpeed cannot convert.
            ModelError: a weight of the teacher is not finite.
            NonFiniteError: too many updates in a row were not.
        """
        self._checkpoint, self._before = goes_on_from(
            resume_from_checkpoint,
            self.args,
            self.zero_stage,
            self.student,
            streams=isinstance(self.train_dataset, RowStream),
        )
        self._num_tokens = self._before.num_tokens
        self.guard.restart(self._before.skipped_steps)
        self._check_teacher()
        check_finite(self.student, "student")
        with watchdog.watched(self.args):
            output = super().train(self._checkpoint, trial, ignore_keys_for_eval)
            if self.on_policy is not None:
                self.on_policy.end()
        return output._replace(training_loss=output.metrics["train_loss"])

    def get_train_dataloader(self):
        whole = self.data_collator
        if self.on_policy is not None and isinstance(whole, Answering):
            self.data_collator = whole.collator  # `mixed` asks about those that are not replaced
        try:
            if not isinstance(self.train_dataset, RowStream):
                return super().get_train_dataloader()
            self._stream = StreamLoader(self.train_dataset, self.data_collator, self.args)
            return self._stream
        finally:
            self.data_collator = whole

    @property
    def _is_of_other_ranks(self) -> bool:
        """Whether another number of ranks wrote the checkpoint that this run goes on from."""
        return self._before.world_size != self.args.world_size

    def _check_teacher(self) -> None:
        """Looks once, when it is on its device, at whether a frozen teacher is finite."""
        if self.model.teacher is not None and not self._teacher_is_checked:
            refuse_nonfinite(self.model.teacher.nonfinite_parameters(), "teacher")
            self._teacher_is_checked = True

    def _run_epoch(self, *args, **kwargs) -> None:
        # Trainer looks at both after an update, and so does one more than asked for
        if self.state.global_step >= self.state.max_steps or self.control.should_training_stop:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _loss_sum(self) -> float:
        """Sum of the losses of all updates of the run, also of those before it was resumed."""
        pending = self._sum_over_ranks(self._tr_loss) / self.args.world_size
        return self._before.loss_sum + self._total_loss_scalar + pending.item()

    def _resume_report(self) -> None:
        """The next report also tells of the steps behind the last one before the interruption."""
        if self._checkpoint is None:
            return
        args = self.args
        kept = Unreported.load(
            self._checkpoint, args.process_index, args.world_size, self._before.world_size
        )
        if kept is None:
            return
        self._globalstep_last_logged, self._num_tokens = kept.step, kept.num_tokens
        self._tr_loss += kept.loss.to(args.device)
        self._before = replace(self._before, loss_sum=kept.loss_sum)
        self.model.meter.restart(None if kept.sums is None else kept.sums.to(args.device))
        self.guard.unreported = kept.steps, kept.taken
        self.clock.resume_lap(kept.seconds)
        if self.on_policy is not None and kept.written:
            self.on_policy.restart(kept.written)

    def _unreported(self) -> Unreported:
        return Unreported(
            self._globalstep_last_logged,
            self._tr_loss.detach(),
            self.model.meter.state,
            *self.guard.unreported,
            self._num_tokens,
            self._before.loss_sum + self._total_loss_scalar,
            self.clock.since_lap(),
            () if self.on_policy is None else self.on_policy.counted,
        )

    def _finalize_training(self, trial, num_train_samples, start_time):
        # means and times are of the whole run
        self._total_loss_scalar += self._before.loss_sum
        self._initial_global_step = 0
        start_time -= self._before.seconds
        # with a limit of 1 Trainer would delete the last checkpoint, from which a longer run goes
        # on, where another one is the best
        with self._without_save_limit():
            return super()._finalize_training(trial, num_train_samples, start_time)

    @contextmanager
    def _without_save_limit(self) -> Iterator[int | None]:
        """Inside, Trainer deletes no checkpoint; gives the limit."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            yield limit
        finally:
            self.args.save_total_limit = limit

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        created = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if created:
            options = self.args.hidden_state_options()
            if options is not None:
                projections = list(self.model.features.parameters())
                group_projections(optimizer, projections, options, self.args.weight_decay)
            # DeepSpeed drops an empty group (LoRA has no biases or norms), schedulers then miscount
            optimizer.param_groups[:] = [g for g in optimizer.param_groups if g["params"]]
        return optimizer

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        if self.is_deepspeed_enabled:
            plugin = self.accelerator.state.deepspeed_plugin
            deepspeed.fit_bucket(plugin.deepspeed_config, self.model.parameters())
        # resumed below: Trainer loads a DeepSpeed checkpoint strictly unless `self.model` is a
        # PeftModel
        with fsdp.wrapping(self.model):
            prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        if resume_from_checkpoint is not None:
            with here.within(READING):
                self._read_checkpoint(resume_from_checkpoint)
        self.guard.engine = self.deepspeed
        if not self.zero_stage:
            self.guard.watch(self.optimizer)
        return prepared

    def _read_checkpoint(self, folder: str) -> None:
        if self.is_deepspeed_enabled:
            self._load_engine(folder)
        if self.is_fsdp_enabled:
            self._load_sharded(folder)
            saving.load_scheduler(self.lr_scheduler, folder)
        else:
            self._load_optimizer_and_scheduler(folder)
        self._load_scaler(folder)
        if self._stream is not None:
            self._stream.restore(folder)
        saving.follow_schedule(self.lr_scheduler)
        self.load_teacher(folder)
        if self.on_policy is not None and not self._is_of_other_ranks:
            self.on_policy.load(folder)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        here.mark("data")
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.on_policy is not None and batches:
            here.mark("generation")
            batches = self.on_policy.mixed(batches, self.state.global_step)
            num_items = self._get_num_items_in_batch(batches, device)
        self._batches, self._random = batches, {}
        return batches, num_items

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs = send_to_device(inputs, self.args.device, non_blocking=True)
        # under DeepSpeed Trainer gives floating tensors the student's dtype, which would round
        # log-probabilities, states of another model, and factors
        exact = {name: inputs.pop(name) for name in (ANSWERS, "token_weights") if name in inputs}
        return super()._prepare_inputs(inputs) | exact

    def _load_engine(self, folder: str) -> None:
        engine, world_size = self.model_wrapped, checkpoint.read_marker(folder).world_size
        if self.zero_stage and world_size != self.args.world_size:
            beside = Path(self.args.output_dir) / "universal"
            saving.load_engine_of_other_ranks(engine, folder, beside)
        else:
            saving.load_engine(engine, folder, self.student)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if self._is_of_other_ranks:  # the states of those are of no use to these
            set_seed(self.args.seed + self.state.global_step)
        else:
            super()._load_rng_state(checkpoint)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device):
        counts = [self.model.counts(batch) for batch in batch_samples]
        self._in_batch = {}
        if counts:
            here = [_total([each[name] for each in counts], device) for name in counts[0]]
            totals = self._sum_over_ranks(torch.stack(here)).unbind()
            self._in_batch = {
                f"num_{name}_in_batch": total for name, total in zip(counts[0], totals, strict=True)
            }
        # Trainer only asks whether there is one: without, it would divide the loss once more
        return next(iter(self._in_batch.values()), None)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**_of_module(inputs), **self._in_batch)
        here.mark("backward")
        loss = outputs["loss"]
        if self._in_batch:  # DDP and DeepSpeed average over ranks what is here a sum over them
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model, inputs, num_items_in_batch=None) -> Tensor:
        if not self._random:  # the first micro-batch of a step
            self._random = nonfinite.random_state()
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.guard.add_loss(loss)
        return torch.zeros_like(loss)  # it counts once its step is taken

    def _explain_skipped(self, step: int) -> str:
        """The first tensors that were not finite, and where the step is kept. Collective."""
        folder = self.nonfinite_folder
        kept_already = on_main(lambda: len(list(folder.glob("step-*"))))
        if kept_already >= self.args.keep_nonfinite_steps:
            return ""
        batches = [_of_module(self._prepare_inputs(dict(batch))) for batch in self._batches]
        rank, world_size = self.args.process_index, self.args.world_size
        step_of_rank = nonfinite.KeptStep(
            step, rank, world_size, batches, self._in_batch, self._random
        )
        with here.within("looking for what broke"):
            return nonfinite.explain(
                step_of_rank,
                self.model,
                self.model_wrapped,
                folder / f"step-{step}",
                lambda student: self.save_model(str(student), _internal_call=True),
            )

    def _count_step(self, loss: Tensor) -> None:
        """A step was taken."""
        self._tr_loss += loss
        for teacher in self_teachers(self.model.teacher).values():
            teacher.follow()

    def peak_mib_by_phase(self) -> dict[str, float]:
        """The largest peak of any rank in each phase so far, see `PeakMemory`. Collective."""
        ranks = gather_object([self.memory.mib])
        return {
            phase: round(max(mib[phase] for mib in ranks if phase in mib), 1)
            for phase in PHASES
            if any(phase in mib for mib in ranks)
        }

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
        measured = means(sums)
        for name in ("kd", "ce"):
            value = measured.pop(name, None)
            if value is not None and getattr(self.args, f"{name}_weight"):
                measured[f"{name}_loss"] = value
        measured["num_tokens"] = self._num_tokens
        measured["tokens_per_s"] = round(sums["num_tokens"] / seconds, 1)
        if self.on_policy is not None:
            generating = self.on_policy.seconds
            measured |= self.on_policy.measurements(self._sum_over_ranks, self.args.device)
            self.on_policy.restart()
            rest = max(seconds - generating, 1e-9)
            measured["tokens_per_s_without_generation"] = round(sums["num_tokens"] / rest, 1)
        measured["peak_mem_mib"] = round(self.memory.of_training(), 1)
        if self.guard.skipped:
            measured["skipped_steps"] = self.guard.skipped
        return measured

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
        has_features, state = self.model.features is not None, self.accelerator.gradient_state
        evaluating = evaluation.evaluating(self.model, self.deepspeed, self.args.device)
        measured = self.clock.paused(), self.memory.within(EVALUATION)
        with measured[0], measured[1], here.within(EVALUATION), evaluating as model:
            for inputs in dataloader:
                inputs = evaluation.without_repeated_samples(inputs, self.args, state, has_features)
                inputs = self._prepare_inputs(inputs)
                with torch.no_grad(), self.accelerator.autocast():
                    model(**inputs)
                self.control: Any = self.callback_handler.on_prediction_step(
                    self.args, self.state, self.control
                )
            sums = self.model.meter.totals(self._sum_over_ranks, self.args.device)
        metrics = evaluation.evaluation_metrics(self.model, sums)
        return EvalLoopOutput(
            predictions=None,
            label_ids=None,
            metrics={f"{metric_key_prefix}_{name}": value for name, value in metrics.items()},
            num_samples=self.num_examples(dataloader),
        )

    # ---- saving and loading ----

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the student as its Auto class or PeftModel reads it. All ranks must call."""
        output_dir = output_dir or self.args.output_dir
        states: tuple[saving.State, saving.State] = (None, None)
        if self.zero_stage == 3 or fsdp.is_sharded(self.model):
            states = saving.gathered_states(self.model, self.args.should_save)
        if self.args.should_save:
            # a checkpoint that it is part of gets its marker when it is whole
            whole = (
                nullcontext(output_dir) if _internal_call else checkpoint.atomic_folder(output_dir)
            )
            with whole as folder:
                saving.write_student(folder, self.model, self.processing_class, states)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_checkpoint(self, model, trial) -> None:
        with self.clock.paused(), self.memory.within(CHECKPOINT), here.within(CHECKPOINT):
            self._save_whole_checkpoint(model, trial)

    def _save_whole_checkpoint(self, model, trial) -> None:
        run_dir = self._get_output_dir(trial)
        pending = self.model.meter.totals(self._sum_over_ranks, self.args.device)
        info = CheckpointInfo(
            self.state.global_step,
            self.args.world_size,
            self.zero_stage,
            self._num_tokens + int(pending["num_tokens"]),
            self._loss_sum(),
            self.clock.since_begin() + self._before.seconds,
            self.guard.skipped,
            self.args.rows_per_step,
            self.is_fsdp_enabled,
        )
        folder = Path(run_dir) / f"checkpoint-{self.state.global_step}"
        whole = saving.whole_checkpoint(
            folder, info, self.args.should_save, self.accelerator.wait_for_everyone
        )
        # older checkpoints go only once this one is whole
        with self._without_save_limit() as limit, whole:
            super()._save_checkpoint(model, trial)
            self._unreported().save(folder, self.args.process_index)
            if self.on_policy is not None:
                self.on_policy.save(folder)
            if self._stream is not None:
                self._stream.save(folder)
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=run_dir,
                save_total_limit=limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )
        self.accelerator.wait_for_everyone()  # whoever ends now leaves a whole checkpoint

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_fsdp_enabled:
            fsdp.save_state(
                output_dir,
                self.model,
                self.optimizer.optimizer,
                whole=self.args.fsdp_plugin_args["state_dict_type"] == fsdp.STATE_DICTS[0],
                only_trainable=isinstance(self.student, PeftModel),
                is_writer=self.args.should_save,
            )
            if self.args.should_save:
                saving.save_scheduler(self.lr_scheduler, output_dir)
        elif self.is_deepspeed_enabled and isinstance(self.student, PeftModel):
            # Trainer would write the frozen base model too, since `self.model` is no PeftModel
            engine, scheduler = self.model_wrapped, self.lr_scheduler
            saving.save_engine(engine, scheduler, output_dir, self.args.should_save)
        else:
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_sharded(self, folder: str) -> None:
        fsdp.load_state(
            folder,
            self.model,
            self.optimizer.optimizer,
            only_trainable=isinstance(self.student, PeftModel),
            is_writer=self.args.should_save,
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model or self.student)
        if self.model.features is not None:
            load_projections(resume_from_checkpoint, self.model.features)

    def load_teacher(self, folder: str | Path) -> None:
        """Of a student that teaches itself, what teaches it, from where `save_model` wrote it."""
        for file, teacher in self_teachers(self.model.teacher).items():
            teacher.load(folder, file)

    def _load_best_model(self) -> None:
        folder = self.state.best_model_checkpoint
        with here.within(READING):
            self.load_teacher(folder)
            if self.is_deepspeed_enabled:
                self._load_engine(folder)
            elif self.is_fsdp_enabled:
                self._load_sharded(folder)
            else:
                self._load_from_checkpoint(folder)


class _AtBegin(TrainerCallback):
    """Acts when training begins, behind what Trainer and the callbacks before this one set."""

    def __init__(self, act: Callable[[], None]):
        self._act = act

    def on_train_begin(self, args, state, control, **kwargs):
        self._act()


def _of_module(inputs: dict[str, Any]) -> dict[str, Any]:
    """A collator's batch without what is not for the module."""
    return {name: value for name, value in inputs.items() if name != "num_samples"}


def _total(counts: list[Tensor | int], device: torch.device) -> Tensor:
    """The sum of counts, some known on the host, without a copy from there; int64."""
    on_host = sum(count for count in counts if not isinstance(count, Tensor))
    total = torch.full((), on_host, dtype=torch.int64, device=device)
    return sum((count for count in counts if isinstance(count, Tensor)), start=total)

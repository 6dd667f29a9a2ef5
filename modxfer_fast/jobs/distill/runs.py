"""The student of a seed, and its training runs as stages: from its start to what they measure."""

import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from modxfer_fast.config import JobConfig, LossSection, OnPolicySection, StudentSection
from modxfer_fast.engine.samples import SAMPLES_FILE
from modxfer_fast.files import read_json, write_json
from modxfer_fast.jobs.distill.arguments import of_processes, training_args
from modxfer_fast.jobs.distill.loggers import run_name
from modxfer_fast.jobs.distill.material import Evaluation
from modxfer_fast.jobs.distill.models import ModelSource
from modxfer_fast.jobs.ranks import barrier, is_main, world_size
from modxfer_fast.jobs.stage import Live, Stage, StageContext
from modxfer_fast.models import apply_peft, load_adapter, load_model, patch_peft_model

MODEL, RESULT = "model", "result.json"  # in the folder of the stage


@dataclass(frozen=True)
class Student:
    """What every run of a seed starts from.

    Attributes:
        kind: "causal_lm" or "encoder".
        source: of the weights.
        base: where an adapter finds its base in the output, if that was made here. Absolute,
            because PEFT takes another path as relative to the current folder.
    """

    section: StudentSection
    kind: str
    seed: int
    source: ModelSource
    base: Path | None

    @property
    def identity(self) -> list[Any]:
        section = self.section
        loaded = section.revision, section.dtype, section.attn_implementation
        return [self.kind, self.seed, self.source, *loaded, section.peft, section.fuses_lora]

    def load(
        self, *, fuse_lora: bool = True, tell: Callable[[str], None] = lambda lines: None
    ) -> PreTrainedModel:
        """The start weights with fresh adapters.

        Args:
            fuse_lora: False for PEFT's own layers also where the section fuses them.
            tell: is given a line for each kind of layer that is fused or is not, in one text.
        """
        model = load_model(self.source.path, self.section, self.kind)
        if self.section.peft is not None:
            model = apply_peft(model, self.section.peft, "student.peft", seed=self.seed)
            if self.base is not None:
                model.peft_config[model.active_adapter].base_model_name_or_path = str(self.base)
        if self.section.fuses_lora and fuse_lora:
            tell(str(patch_peft_model(model)))
        return model

    def load_trained(self, folder: Path) -> PreTrainedModel:
        """What a run saved, as anyone would load it."""
        if self.section.peft is None:
            return load_model(str(folder), self.section, self.kind)
        return load_adapter(load_model(self.source.path, self.section, self.kind), folder)


@dataclass(frozen=True)
class Run:
    """Options of a run.

    Attributes:
        teacher: told by its weights.
        loss: that the run minimises.
        on_policy: whether it also learns from what the student writes, and how.
    """

    student: Student
    teacher: Live
    loss: LossSection
    evaluation: Evaluation
    on_policy: OnPolicySection | None = None


def roles(config: JobConfig) -> Iterator[tuple[str, str, LossSection]]:
    """The runs of each seed: name in the report, title, loss. They differ in the loss alone."""
    compare, loss = config.compare, config.loss
    logits = loss.model_copy(update={"hidden_states": None, "relations": None})
    if compare.ce_only or compare.parts:
        alone = logits.model_copy(update={"kd_weight": 0.0, "ce_weight": 1.0})
        yield "ce_only", "Student, cross entropy alone", alone
    if compare.parts and loss.has_features and loss.kd_weight:
        yield "logit_kd", "Student, distilled from logits alone", logits
    yield "student", "Student, distilled", loss


def run_stage(
    role: str,
    title: str,
    loss: LossSection,
    student: Student,
    teacher: Live,
    evaluation: Evaluation,
    on_policy: OnPolicySection | None = None,
) -> Stage:
    """The stage of one run, in which every process takes part."""
    if not loss.kd_weight and not loss.has_features:  # nobody would judge what the student writes
        on_policy = None
    options = Run(student, teacher, loss, evaluation, on_policy)
    name = f"seed-{student.seed}/{role}"
    return Stage(name, _train, options, on_all_ranks=True, title=title)


def _train(context: StageContext) -> None:
    run: Run = context.options
    student, teacher, evaluation = run.student, run.teacher.value, run.evaluation
    section = of_processes(evaluation.training, evaluation.material.processes, world_size())
    # before the student: under ZeRO-3 it is partitioned while it is loaded
    named = run_name(section, evaluation.material.work, context.checkpoints)
    args = training_args(
        {**section, "run_name": named},
        "training",
        context.checkpoints,
        run.loss,
        seed=student.seed,
        kind=student.kind,
        on_policy=run.on_policy,
    )
    material, model = evaluation.material, context.folder / MODEL
    trainer = material.trainer(student.load(), args, teacher)
    seconds = material.train(trainer)
    trainer.save_model(str(model))
    samples = context.checkpoints / SAMPLES_FILE
    if is_main() and samples.is_file():
        shutil.copy(samples, model)
    barrier()  # the main process writes, every process reads it below
    history = trainer.state.log_history
    peaks = trainer.peak_mib_by_phase()
    accelerator = trainer.accelerator
    del trainer
    accelerator.free_memory()  # weights and moments, before the student is loaded once more
    with evaluation.loading():
        trained = student.load_trained(model)
    last = {key: value for entry in history for key, value in entry.items()}
    result = {
        "seconds": seconds,
        **{key: last.get(key) for key in ("tokens_per_s", "peak_mem_mib")},
        "peak_mib_by_phase": peaks,
        # the last held-out losses inside the networks: the saved student has no projections
        **{key: last[key] for key in ("eval_hidden_loss", "eval_relation_loss") if key in last},
        **evaluation.figures(trained, teacher, projections=model),
        "history": history,
    }
    if is_main():
        write_json(context.folder / RESULT, result)


def read_result(folder: Path) -> dict[str, Any]:
    """What a run measured; JSON has no infinity, and a figure that was infinite became null."""
    result = read_json(folder / RESULT)
    keys = ("eval_perplexity", "eval_kd")
    infinite = {key: math.inf for key in keys if result.get(key, 0.0) is None}
    return {**result, **infinite}

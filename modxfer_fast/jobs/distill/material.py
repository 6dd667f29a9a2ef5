"""What every phase of a job shares, the trainer it makes from it, and how it measures models."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback

from modxfer_fast import engine
from modxfer_fast.config import LossSection
from modxfer_fast.data import Rows
from modxfer_fast.engine.students import student_of_kind
from modxfer_fast.jobs.distill.arguments import evaluation_args
from modxfer_fast.jobs.distill.loggers import run_of_its_own
from modxfer_fast.jobs.ranks import on_main, world_size
from modxfer_fast.jobs.sharding import Sharding
from modxfer_fast.jobs.termination import checkpoint_on_sigterm
from modxfer_fast.report import ConsoleCallback, JobConsole

_INSIDE = ("eval_hidden_", "eval_relation_")
CROSS_ENTROPY = LossSection(kd_weight=0.0, ce_weight=1.0)
# Held-out figures of causal language models always mean this, whatever a run minimises.
_MEASURED = LossSection(divergence="forward_kl", temperature=1.0, kd_weight=1.0, ce_weight=1.0)


@dataclass(frozen=True)
class Material:
    """Console, folder of the unfinished output, tokenizer and rows.

    kind: of the models, "causal_lm" or "encoder".
    digest: identifies the documents and how they became rows.
    processes: that the job began with.
    """

    console: JobConsole
    work: Path
    tokenizer: PreTrainedTokenizerBase
    rows: Rows
    kind: str
    digest: str
    processes: int = 1

    @property
    def identity(self) -> str:
        return self.digest

    def trainer(
        self,
        model: PreTrainedModel,
        args: engine.DistillConfig,
        teacher: engine.TeacherProtocol | engine.SelfDistillation | None = None,
        *,
        learns: bool = True,
    ) -> engine.DistillTrainer:
        """A trainer on the rows that reports to the console; without `learns` for evaluation."""
        trainer = engine.DistillTrainer(
            model=model,
            args=args,
            teacher=teacher,
            train_dataset=self.rows.train if learns else None,
            eval_dataset=self.rows.held_out,
            data_collator=self.rows.collator,
            processing_class=self.tokenizer,
            callbacks=[ConsoleCallback(self.console)],
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    def train(self, trainer: engine.DistillTrainer) -> float:
        """Train from the newest whole checkpoint of the trainer's folder, where there is one.

        Returns:
            Seconds of the whole run, also of what came before an interruption.
        Raises:
            Terminated: SIGTERM came, and a checkpoint is written.
        """
        folder, say = trainer.args.output_dir, self.console.say
        last = on_main(lambda: engine.last_complete_checkpoint(folder, say))
        with checkpoint_on_sigterm(trainer), run_of_its_own():
            output = trainer.train(resume_from_checkpoint=last)
        return output.metrics["train_runtime"]


@dataclass(frozen=True)
class Evaluation:
    """The held-out rows, and how a job computes on them.

    Attributes:
        training, loss: sections of the job; an encoder is measured by the losses it is trained by.
    """

    material: Material
    training: dict[str, Any]
    loss: LossSection

    @property
    def has_logits(self) -> bool:
        return student_of_kind(self.material.kind).has_logits

    def args(self, loss: LossSection | None = None, seed: int = 0) -> engine.DistillConfig:
        """Precision and batch size of training, unsharded; None for the loss that figures mean."""
        meant = loss or (_MEASURED if self.has_logits else self.loss)
        material = self.material
        return evaluation_args(self.training, material.work, meant, seed=seed, kind=material.kind)

    def loading(self) -> AbstractContextManager:
        """Inside, a student is loaded to be measured: divided over the ranks where training divides
        it, so that one that fits no rank whole is measured too. Collective."""
        sharding = Sharding.of(self.training, world_size())
        if sharding.over("parameters") == 1:
            return nullcontext()
        return engine.deepspeed.loading_in_parts(offload="parameters" in sharding.offloads)

    def figures(
        self,
        model: PreTrainedModel,
        teacher: engine.TeacherProtocol | engine.SelfDistillation | None,
        *,
        seed: int = 0,
        projections: Path | None = None,
    ) -> dict[str, Any]:
        """Held-out figures of a model.

        Of a causal language model eval_perplexity and, with a teacher, eval_kd: KL(teacher ||
        model) per token. Of an encoder eval_hidden_loss and the like. Of each of several sources
        the same in "sources", by its label.

        Args:
            seed: that projections start from. projections: folder of trained ones, for encoders,
                and of what teaches a student that teaches itself.
        """
        args = self.args(CROSS_ENTROPY if teacher is None else None, seed)
        trainer = self.material.trainer(model, args, teacher, learns=False)
        if projections is not None and not self.has_logits:
            engine.load_projections(projections, trainer.model.features)
        if projections is not None:
            trainer.load_teacher(projections)
        wanted = ("eval_perplexity", "eval_kd") if self.has_logits else _INSIDE
        rows = self.material.rows
        found = _measured(trainer, rows.held_out, wanted)
        if rows.held_out_of:
            of_each = rows.held_out_of.items()
            found["sources"] = {label: _measured(trainer, own, wanted) for label, own in of_each}
        accelerator = trainer.accelerator
        del model, trainer
        accelerator.free_memory()  # which would wait for a collection of cycles
        return found


def _measured(
    trainer: engine.DistillTrainer, rows: Dataset, wanted: tuple[str, ...]
) -> dict[str, Any]:
    metrics = trainer.evaluate(rows)
    return {key: value for key, value in metrics.items() if key.startswith(wanted)}

"""What every phase of a job shares, and the trainer it makes from it."""

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback

from modxfer_fast.data import CausalCollator, EncoderCollator, Rows
from modxfer_fast.engine import (
    DistillConfig,
    DistillTrainer,
    Teacher,
    last_complete_checkpoint,
)
from modxfer_fast.jobs.ranks import from_main, is_main
from modxfer_fast.jobs.termination import checkpoint_on_sigterm
from modxfer_fast.report import ConsoleCallback, JobConsole


@dataclass(frozen=True)
class Material:
    """Console, folder of the unfinished output, tokenizer and rows.

    packed: whether a row may hold several documents.
    kind: of the models, "causal_lm" or "encoder".
    digest: identifies the training documents and how they became rows.
    """

    console: JobConsole
    work: Path
    tokenizer: PreTrainedTokenizerBase
    rows: Rows
    packed: bool
    kind: str
    digest: str

    @property
    def collator(self) -> CausalCollator | EncoderCollator:
        if self.kind == "encoder":
            return EncoderCollator(self.tokenizer.pad_token_id)
        return CausalCollator(self.tokenizer.pad_token_id, packed=self.packed)

    def trainer(
        self, model: PreTrainedModel, args: DistillConfig, teacher: Teacher | None = None
    ) -> DistillTrainer:
        """A trainer on the rows that reports to the console."""
        trainer = DistillTrainer(
            model=model,
            args=args,
            teacher=teacher,
            train_dataset=self.rows.train,
            eval_dataset=self.rows.held_out,
            data_collator=self.collator,
            processing_class=self.tokenizer,
            callbacks=[ConsoleCallback(self.console)],
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    def train(self, trainer: DistillTrainer) -> float:
        """Train from the newest whole checkpoint of the trainer's folder, where there is one.

        Returns:
            Seconds of the whole run, also of what came before an interruption.
        Raises:
            Terminated: SIGTERM came, and a checkpoint is written.
        """
        last = None
        if is_main():
            last = last_complete_checkpoint(trainer.args.output_dir, self.console.say)
        with checkpoint_on_sigterm(trainer):
            output = trainer.train(resume_from_checkpoint=from_main(last))
        return output.metrics["train_runtime"]

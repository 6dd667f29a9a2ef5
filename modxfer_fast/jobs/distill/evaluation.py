"""How models are measured on held-out text."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from modxfer_fast.config import LossSection
from modxfer_fast.engine import DistillConfig, Teacher, load_projections
from modxfer_fast.engine.students import student_of_kind
from modxfer_fast.jobs.distill.arguments import evaluation_args, facts_of_training
from modxfer_fast.jobs.distill.material import Material
from modxfer_fast.jobs.distill.models import CROSS_ENTROPY

# Held-out figures of causal language models always mean this, whatever a run minimises.
_MEASURED = LossSection(divergence="forward_kl", temperature=1.0, kd_weight=1.0, ce_weight=1.0)


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

    @property
    def identity(self) -> list[Any]:
        return [self.material.digest, facts_of_training(self.training), self.loss]

    def args(self, loss: LossSection | None = None, seed: int = 0) -> DistillConfig:
        """Precision and batch size of training, unsharded; None for the loss that figures mean."""
        meant = loss or (_MEASURED if self.has_logits else self.loss)
        material = self.material
        return evaluation_args(self.training, material.work, meant, seed=seed, kind=material.kind)

    def figures(
        self,
        model: PreTrainedModel,
        teacher: Teacher | None,
        *,
        seed: int = 0,
        projections: Path | None = None,
    ) -> dict[str, float]:
        """Held-out figures of a model.

        Of a causal language model eval_perplexity and, with a teacher, eval_kd: KL(teacher ||
        model) per token. Of an encoder eval_hidden_loss and the like.

        Args:
            seed: that projections start from. projections: folder of trained ones, for encoders.
        """
        args = self.args(CROSS_ENTROPY if teacher is None else None, seed)
        trainer = self.material.trainer(model, args, teacher)
        if not self.has_logits:
            if projections is not None:
                load_projections(projections, trainer.model.features)
            prefixes = ("eval_hidden_", "eval_relation_")
            return {k: v for k, v in trainer.evaluate().items() if k.startswith(prefixes)}
        metrics = trainer.evaluate()
        return {key: metrics[key] for key in ("eval_perplexity", "eval_kd") if key in metrics}

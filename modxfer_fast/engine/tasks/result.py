"""What training on a task comes to: the learning curve, the best step, the test scores."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class TaskResult:
    """Scores of one training run.

    metric: name of the score that is compared, among those of `history` and `test`.
    history: {"step", "loss" and scores} of the validation split, from step 0, before any training.
    best_step: the first step with the highest score.
    tested_step: the step whose weights gave `test`, and are now the model's.
    train_loss: {"step", "loss"}, means since the step before.
    seconds: of training, evaluation left out. truncated: examples cut, by split.
    checkpoints: {"step", "validation", "test"}, the score that is compared on both splits, after
        the steps that were asked for.
    """

    metric: str
    history: tuple[dict[str, float], ...]
    train_loss: tuple[dict[str, float], ...]
    best_step: int
    tested_step: int
    test: dict[str, float]
    steps: int
    seconds: float
    trainable_parameters: int
    truncated: dict[str, int]
    checkpoints: tuple[dict[str, float], ...] = ()

    def score(self, step: int) -> float:
        """The validation score at a step of `history`."""
        return next(point[self.metric] for point in self.history if point["step"] == step)

    @property
    def initial(self) -> float:
        """The validation score before any training."""
        return self.history[0][self.metric]

    @property
    def best(self) -> float:
        return self.score(self.best_step)

    @property
    def final(self) -> float:
        """The validation score after the last step."""
        return self.history[-1][self.metric]

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it; `TaskResult.from_dict` reads it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "TaskResult":
        lists = ("history", "train_loss", "checkpoints")
        curves = {name: tuple(fields[name]) for name in lists if name in fields}
        return cls(**{**fields, **curves})

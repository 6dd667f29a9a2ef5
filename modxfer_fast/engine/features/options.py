"""Options of the losses inside the networks, as they stand in a configuration."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from modxfer_fast.config.loss import TOKENS


@dataclass(frozen=True)
class HiddenStateOptions:
    """Arguments of `HiddenStateLoss`, and what the engine alone decides.

    tokens: which tokens count: "all" that are no padding, or those with "labels".
    learning_rate, weight_decay: of the projections; None leaves them to the trainer's groups.
    """

    layers: dict[int, int]
    loss: str = "mse"
    beta: float | None = None
    norm: str = "none"
    norm_eps: float = 1e-6
    weight: float | dict[int, float] = 1.0
    pair_reduction: str = "mean"
    projection: str = "full"
    rank: int | None = None
    bias: bool = False
    shared: bool = False
    init: str = "orthogonal"
    workspace_mb: int = 64
    backend: str | None = None
    impl: str = "fused"
    tokens: str = "all"
    learning_rate: float | None = None
    weight_decay: float | None = None

    def __post_init__(self):
        if self.tokens not in TOKENS:
            raise ValueError(f"tokens: expected one of {', '.join(TOKENS)}, got {self.tokens!r}")
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise ValueError(f"learning_rate: expected a positive number, got {self.learning_rate}")
        if self.weight_decay is not None and not self.weight_decay >= 0:
            raise ValueError(f"weight_decay: expected at least 0, got {self.weight_decay}")

    def of_loss(self) -> dict[str, Any]:
        """What `HiddenStateLoss` takes."""
        return _without(self, ("tokens", "learning_rate", "weight_decay"))


@dataclass(frozen=True)
class RelationOptions:
    """Arguments of `AttentionRelationLoss`; every token that is no padding counts."""

    layers: dict[int, int]
    kind: str = "minilmv2"
    num_heads: int | None = None
    weight: float | dict[int, float] = 1.0
    relation_weights: tuple[float, float, float] = (1.0, 1.0, 1.0)
    pair_reduction: str = "mean"
    workspace_mb: int = 64
    backend: str | None = None

    def of_loss(self) -> dict[str, Any]:
        """What `AttentionRelationLoss` takes."""
        return _without(self, ())


def _without(options, names: tuple[str, ...]) -> dict[str, Any]:
    fields = (field.name for field in dataclasses.fields(options))
    return {name: getattr(options, name) for name in fields if name not in names}


def parse_options(cls, section, where: str):
    """`cls` from a mapping of its fields; None stays None.

    Raises:
        ValueError, TypeError: an unknown or missing field, or a value out of range.
    """
    if section is None or isinstance(section, cls):
        return section
    if not isinstance(section, dict):
        raise TypeError(f"{where}: expected a dict of options, got {type(section).__name__}")
    names = [field.name for field in dataclasses.fields(cls)]
    unknown = [name for name in section if name not in names]
    if unknown:
        raise ValueError(f"{where}: expected options among {', '.join(names)}, got {unknown[0]!r}")
    if "layers" not in section:
        raise ValueError(f"{where}.layers: missing, and it has no default")
    try:
        return cls(**section)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{where}.{error}") from error

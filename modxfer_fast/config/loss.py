"""The loss section: of the logits, of hidden states and of attention relations."""

import re
from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from modxfer_fast.config.section import (
    NotNegative,
    OneOf,
    OneOfOrWeights,
    Positive,
    PositiveInt,
    Section,
)
from modxfer_fast.kernels.divergences import (
    ALPHAS,
    BETAS,
    DIVERGENCES,
    FORMULAS,
    resolve,
    resolve_sum,
)
from modxfer_fast.kernels.names import (
    BACKENDS,
    GRADIENTS,
    IMPLS,
    INITS,
    LOSSES,
    NORMS,
    PAIR_REDUCTIONS,
    PROJECTIONS,
    RELATIONS,
)


def _layer_numbers(value: Any) -> Any:
    """Layer numbers as ints: keys of JSON, and of `--set` with a dotted path, are text."""
    if not isinstance(value, dict):
        return value
    is_number = re.compile(r"-?[0-9]+").fullmatch
    return {
        int(key) if isinstance(key, str) and is_number(key) else key: item
        for key, item in value.items()
    }


Layers = Annotated[dict[int, int], BeforeValidator(_layer_numbers), Field(min_length=1)]
LayerWeights = Annotated[float | dict[int, float], BeforeValidator(_layer_numbers)]
Backend = Annotated[str, OneOf(BACKENDS)] | None
RelationWeights = Annotated[list[NotNegative], Field(min_length=3, max_length=3, strict=False)]
PairReduction = Annotated[str, OneOf(PAIR_REDUCTIONS)]
TOKENS = ("all", "labels")
LOSS_IMPLS = ("fused", "dense")


class HiddenStatesSection(Section):
    """Arguments of `modxfer_fast.losses.HiddenStateLoss`: layers that learn from layers.

    layers: {student layer: teacher layer}; 0 is the embeddings, i the output of block i, -1 that of
        the last block.
    weight: one number, or {student layer: number}.
    tokens: which tokens count, `all` that are no padding or those with `labels`.
    learning_rate, weight_decay: of the projections; null takes those of `training`.
    impl: eager is the plain PyTorch yardstick.
    """

    layers: Layers
    loss: Annotated[str, OneOf(LOSSES)] = "mse"
    beta: NotNegative | None = None
    norm: Annotated[str, OneOf(NORMS)] = "none"
    norm_eps: Positive = 1e-6
    weight: LayerWeights = 1.0
    pair_reduction: PairReduction = "mean"
    projection: Annotated[str, OneOf(PROJECTIONS)] = "full"
    rank: PositiveInt | None = None
    bias: bool = False
    shared: bool = False
    init: Annotated[str, OneOf(INITS)] = "orthogonal"
    workspace_mb: PositiveInt = 64
    backend: Backend = None
    impl: Annotated[str, OneOf(IMPLS)] = "fused"
    tokens: Annotated[str, OneOf(TOKENS)] = "all"
    learning_rate: Positive | None = None
    weight_decay: NotNegative | None = None

    @model_validator(mode="after")
    def _consistent(self):
        if (self.projection == "low_rank") != (self.rank is not None):
            raise ValueError("rank: expected together with projection: low_rank, and only there")
        if self.beta is not None and self.loss != "smooth_l1":
            raise ValueError(f"beta: expected with loss: smooth_l1 alone, got it with {self.loss}")
        return self

    def of_loss(self) -> dict[str, Any]:
        """The arguments of `HiddenStateLoss`, without what the engine alone decides."""
        return self.model_dump(exclude={"tokens", "learning_rate", "weight_decay"})


class RelationsSection(Section):
    """Arguments of `modxfer_fast.losses.AttentionRelationLoss`; needs `data.packing: false`.

    layers: {student block: teacher block}, from 1; -1 is the last.
    num_heads: relation heads; null takes as many as fit the widths of both models.
    """

    layers: Layers
    kind: Annotated[str, OneOf(RELATIONS)] = "minilmv2"
    num_heads: PositiveInt | None = None
    weight: LayerWeights = 1.0
    relation_weights: RelationWeights = [1.0, 1.0, 1.0]
    pair_reduction: PairReduction = "mean"
    workspace_mb: PositiveInt = 64
    backend: Backend = None


class FeaturesSection(Section):
    """Losses inside the networks alone, as `DistillConfig` has them."""

    hidden_states: HiddenStatesSection | None = None
    relations: RelationsSection | None = None


class DivergenceSection(Section):
    """temperature: divides the logits of both sides inside the divergence.
    scale_by_temperature_squared: whether the divergence is multiplied by temperature^2.
    """

    temperature: Positive = 1.0
    scale_by_temperature_squared: bool = False


class LogitsSection(DivergenceSection):
    """kd_weight * D(teacher, student) + ce_weight * cross entropy + z_loss_weight * z-loss.

    label_smoothing: share of the label's probability that goes to all classes alike.
    z_loss_weight: factor of (log sum exp of the student's logits)^2.
    """

    kd_weight: NotNegative = 1.0
    ce_weight: NotNegative = 0.0
    label_smoothing: Annotated[float, Field(ge=0, le=1)] = 0.0
    z_loss_weight: NotNegative = 0.0


class LossSection(LogitsSection):
    __doc__ = f"""Arguments of `modxfer_fast.linear_kd_loss`; `impl` dense is plain PyTorch.

    divergence: of p, the teacher, and q, the student: {FORMULAS}. Or weights of several, by name.
    alpha, beta: of those that read them; null is, of alpha, {ALPHAS}; of beta, {BETAS}.
    label_smoothing: share of the label's probability that goes to all classes alike.
    z_loss_weight: factor of (log sum exp of the student's logits)^2.
    workspace_mb: MiB for logits in flight; null is 512, on a GPU at least what 1024 tokens take.
    filter_eps: what a gradient of the logits may have, times the token's factor in the loss, for
        its class to be left out of the products of the gradients.
    gradients: forward makes them beside the loss, recompute in the backward, for less memory.
    What models do to their logits, a scale or a soft cap, is read from their configurations.
    hidden_states, relations: losses inside the networks, beside those of the logits.
    """

    divergence: Annotated[str | dict[str, float], OneOfOrWeights(tuple(DIVERGENCES))] = "forward_kl"
    alpha: float | None = None
    beta: float | None = None
    workspace_mb: PositiveInt | None = None
    gradients: Annotated[str, OneOf(GRADIENTS)] = GRADIENTS[0]
    filter_eps: Positive | None = None
    backend: Backend = None
    impl: Annotated[str, OneOf(LOSS_IMPLS)] = "fused"
    hidden_states: HiddenStatesSection | None = None
    relations: RelationsSection | None = None

    @model_validator(mode="after")
    def _consistent(self):
        if isinstance(self.divergence, dict):
            try:
                resolve_sum(self.divergence, self.divergence.values(), self.alpha, self.beta)
            except TypeError as error:  # which pydantic does not take for one of the user's
                raise ValueError(error) from None
        else:
            resolve(self.divergence, self.alpha, self.beta)
        return self

    def of_logits(self) -> dict[str, Any]:
        """The arguments of `linear_kd_loss` alone."""
        return self.model_dump(exclude={"impl", "hidden_states", "relations"})

    @property
    def is_of_logits(self) -> bool:
        """Whether the divergence is one of logits themselves, not of probabilities."""
        record = DIVERGENCES.get(str(self.divergence))  # none of several by weight
        return record is not None and record.row_sums == "of_logits"

    @property
    def weights(self) -> tuple[float, float, float]:
        """Of the terms of the loss of the logits."""
        return self.kd_weight, self.ce_weight, self.z_loss_weight

    @property
    def has_features(self) -> bool:
        """Whether there is a loss inside the networks."""
        return self.hidden_states is not None or self.relations is not None


def check_learns(weights: Iterable[float], has_features: bool, where: str = "") -> None:
    """Check that something is learnt.

    Args:
        weights: of the loss of the logits: kd_weight, ce_weight and z_loss_weight.
        has_features: whether there is a loss inside the networks.
        where: dotted path of the loss with its last dot, for messages.
    Raises:
        ValueError: nothing is.
    """
    if not any(weights) and not has_features:
        raise ValueError(
            f"{where}kd_weight: expected more than 0 where ce_weight and z_loss_weight are 0 and "
            "there are no hidden_states or relations, got 0; nothing would be learnt"
        )


def check_encoder_loss(
    kd_weight: float, ce_weight: float, hidden_states: Any, where: str = ""
) -> None:
    """Check the loss of an encoder, which learns from hidden states and nothing else.

    Args:
        hidden_states: None, or an object that has `tokens`.
        where: dotted path of the loss with its last dot, for messages.
    Raises:
        ValueError: names the option.
    """
    for name, weight in (("kd_weight", kd_weight), ("ce_weight", ce_weight)):
        if weight != 0:
            raise ValueError(
                f"{where}{name}: expected 0 or nothing with kind: encoder, which has no logits, "
                f"got {weight}"
            )
    if hidden_states is None:
        raise ValueError(
            f"{where}hidden_states: expected a section with kind: encoder, which learns by it"
        )
    if hidden_states.tokens != "all":
        raise ValueError(
            f"{where}hidden_states.tokens: expected all with kind: encoder, whose text has no "
            f"labels, got {hidden_states.tokens}"
        )

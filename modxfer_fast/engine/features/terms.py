"""Losses inside the networks: hidden states and attention relations of mapped layers.

Their mean is over the tokens of a whole optimiser step, like that of the other terms, but over
another set of them: all that are no padding, unless `tokens` says that those with labels count.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from modxfer_fast.config import HiddenStatesSection, RelationsSection
from modxfer_fast.engine.batch import Terms, TokenSet
from modxfer_fast.engine.features.taps import LayerStates, LayerTaps
from modxfer_fast.losses import AttentionRelationLoss, HiddenStateLoss, HiddenTerms
from modxfer_fast.losses.layer_pairs import pair_name


class FeatureLosses(nn.Module):
    """Hidden-state and relation losses of one student and its teacher.

    Registered in the module that DDP and DeepSpeed wrap: projections are trained, sharded and
    resumed with the student's parameters, and saved apart from them.

    Args:
        hidden_options, relation_options: one of them may be None.
        student_taps, teacher_taps: of the two backbones; told here what to take.
        causal: whether a token attends to those before it alone.
        generator: random numbers of the projections.

    Raises:
        ValueError, TypeError: an option that does not fit the two models.
    """

    def __init__(
        self,
        hidden_options: HiddenStatesSection | None,
        relation_options: RelationsSection | None,
        student_taps: LayerTaps,
        teacher_taps: LayerTaps,
        causal: bool = True,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        counts: dict[str, Any] = {
            "num_student_layers": student_taps.num_layers,
            "num_teacher_layers": teacher_taps.num_layers,
        }
        self.hidden = self.relation = None
        self.num_student_layers = student_taps.num_layers
        self._hidden_tokens = "all" if hidden_options is None else hidden_options.tokens
        if hidden_options is not None:
            with _named("hidden_states"):
                self.hidden = HiddenStateLoss(
                    student_width=student_taps.hidden_width,
                    teacher_width=teacher_taps.hidden_width,
                    generator=generator,
                    **counts,
                    **hidden_options.of_loss(),
                )
            student_taps.hidden_layers = self.hidden.student_layers
            teacher_taps.hidden_layers = self.hidden.teacher_layers
        if relation_options is not None:
            with _named("relations"):
                self.relation = AttentionRelationLoss(
                    causal=causal, **counts, **relation_options.model_dump()
                )
                student_taps.qkv_layers = self.relation.student_layers
                teacher_taps.qkv_layers = self.relation.teacher_layers
                _check_relations(self.relation, student_taps, teacher_taps)

    @property
    def names(self) -> tuple[str, ...]:
        """Keys of `Terms.sums`, which are the names in the logs."""
        return tuple(
            f"{name}_{part}"
            for name, loss in (("hidden", self.hidden), ("relation", self.relation))
            if loss is not None
            for part in ("loss", *map(pair_name, loss.pairs))
        )

    @property
    def measured_names(self) -> tuple[str, ...]:
        """`names`, and those that evaluation alone adds."""
        if self.hidden is None:
            return self.names
        pairs = (f"hidden_cosine_{pair_name(pair)}" for pair in self.hidden.pairs)
        return (*self.names, "hidden_cosine", *pairs)

    @property
    def needs_all_tokens(self) -> bool:
        """Whether a term is a mean over all tokens, not over those with labels."""
        return self.relation is not None or self._hidden_tokens == "all"

    def forward(
        self,
        student: LayerStates,
        teacher: LayerStates,
        all_tokens: TokenSet,
        labelled: TokenSet | None,
    ) -> Terms:
        """Terms of one micro-batch.

        In eval mode also the cosine of projected state and teacher's state, after the norm of the
        loss: hidden_cosine, a mean over the pairs, and each pair's.
        """
        losses, sums = [], {}
        if self.hidden is not None:
            tokens = all_tokens if self._hidden_tokens == "all" else labelled
            if tokens is None:
                raise ValueError("hidden_states.tokens: expected all without labels, got 'labels'")
            terms = self.hidden(
                student.hidden,
                teacher.hidden,
                mask=tokens.mask,
                normalizer=tokens.normalizer,
                num_valid=tokens.num_valid,
            )
            losses.append(terms.loss)
            sums.update(_sums("hidden", self.hidden.pairs, terms, tokens))
            if not self.training:
                cosines = self.hidden.cosines(
                    student.hidden, teacher.hidden, mask=tokens.mask, num_valid=tokens.num_valid
                )
                count = tokens.number(cosines.device)
                cosines = cosines.double() * count
                sums["hidden_cosine"] = (cosines.mean(), count)
                for pair, cosine in zip(self.hidden.pairs, cosines, strict=True):
                    sums[f"hidden_cosine_{pair_name(pair)}"] = (cosine, count)
        if self.relation is not None:
            terms = self.relation(
                student.qkv,
                teacher.qkv,
                mask=all_tokens.mask,
                normalizer=all_tokens.normalizer,
            )
            losses.append(terms.loss)
            sums.update(_sums("relation", self.relation.pairs, terms, all_tokens))
        return Terms(sum(losses[1:], start=losses[0]), sums)


def _sums(
    name: str, pairs, terms: HiddenTerms, tokens: TokenSet
) -> dict[str, tuple[Tensor, Tensor]]:
    """Sums over tokens: the weighted term under `<name>_loss`, and each pair unweighted."""
    count = tokens.number(terms.loss.device)
    normalizer = count if tokens.normalizer is None else tokens.normalizer
    sums = {f"{name}_loss": (terms.loss.detach().double() * normalizer, count)}
    for pair, value in zip(pairs, terms.pairs, strict=True):
        sums[f"{name}_{pair_name(pair)}"] = (value.double() * normalizer, count)
    return sums


@contextlib.contextmanager
def _named(where: str) -> Iterator[None]:
    """Puts the name of the section in front of an error about its options."""
    try:
        yield
    except (TypeError, ValueError) as error:
        if str(error).startswith(where):
            raise
        raise type(error)(f"{where}.{error}") from error


def _check_relations(
    relation: AttentionRelationLoss, student_taps: LayerTaps, teacher_taps: LayerTaps
) -> None:
    for student, teacher in relation.pairs:
        widths = [*student_taps.qkv_widths(student), *teacher_taps.qkv_widths(teacher)]
        if relation.kind == "minilm":
            for role, taps, layer in (
                ("student", student_taps, student),
                ("teacher", teacher_taps, teacher),
            ):
                if taps.is_rotary(layer):
                    raise ValueError(
                        f"kind: expected minilmv2, because the {role} rotates queries and keys "
                        "after their projections, so their product is not its attention; "
                        "got 'minilm'"
                    )
        elif relation.num_heads is not None and any(w % relation.num_heads for w in widths):
            raise ValueError(
                f"num_heads: expected a divisor of the widths {sorted(set(widths))} of queries, "
                f"keys and values, got {relation.num_heads}"
            )

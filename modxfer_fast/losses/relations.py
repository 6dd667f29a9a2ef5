"""Losses of the attention relations of two layers: MiniLM and MiniLMv2."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from modxfer_fast.errors import check_choice
from modxfer_fast.kernels.names import RELATIONS
from modxfer_fast.kernels.relation_loss import minilm_loss, minilmv2_loss
from modxfer_fast.losses.layer_pairs import HiddenTerms, LayerPairLoss

_MIN_HEAD_WIDTH = 16

QKV = tuple[Tensor, Tensor, Tensor]


class AttentionRelationLoss(LayerPairLoss):
    """sum over pairs of weight_i * relation loss of (query, key, value) [/ number of pairs].

    minilmv2: KL of query-query, key-key and value-value relations, in `num_heads` relation heads
    that need not be attention heads, so that widths may differ (arXiv 2012.15828).
    minilm: KL of the attention distributions and of the value relations (arXiv 2002.10957), which
    needs as many attention heads in both models, and query and key as they enter the product.

    Args:
        layers: {student block: teacher block}, from 1; -1 is the last, see layer_pairs.py.
        num_student_layers, num_teacher_layers: blocks of each model; needed for negative layers.
        kind: "minilmv2" or "minilm".
        num_heads: relation heads; for "minilm" the attention heads of both models. None: for
            "minilmv2" as many as divide every width and leave 16 columns to each.
        weight: one number, or {student block: number}.
        relation_weights: factors of the query, key and value relations of "minilmv2"; of "minilm"
            the last one alone is used, for its value relation.
        pair_reduction: "mean" divides the weighted sum by the number of pairs, "sum" does not.
        causal: token i sees the tokens j <= i only, as in a decoder.
        workspace_mb, backend: as for `relation_loss`.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """

    first_layer = 1

    def __init__(
        self,
        layers: Mapping[int, int],
        *,
        num_student_layers: int | None = None,
        num_teacher_layers: int | None = None,
        kind: str = "minilmv2",
        num_heads: int | None = None,
        weight: float | Mapping[int, float] = 1.0,
        relation_weights: tuple[float, float, float] = (1.0, 1.0, 1.0),
        pair_reduction: str = "mean",
        causal: bool = False,
        workspace_mb: int = 64,
        backend: str | None = None,
    ):
        counts = num_student_layers, num_teacher_layers
        super().__init__(layers, *counts, weight, pair_reduction, workspace_mb, backend)
        check_choice("kind", kind, RELATIONS)
        if kind == "minilm" and num_heads is None:
            raise ValueError("num_heads: expected the attention heads of both models, got None")
        if num_heads is not None and num_heads < 1:
            raise ValueError(f"num_heads: expected a positive number, got {num_heads}")
        if len(relation_weights) != 3 or not any(relation_weights) or min(relation_weights) < 0:
            raise ValueError(
                "relation_weights: expected three numbers of at least 0, not all 0, "
                f"got {relation_weights}"
            )
        self.kind = kind
        self.num_heads = num_heads
        first, second, third = map(float, relation_weights)
        self.relation_weights = first, second, third
        self.options = {"causal": causal, "workspace_mb": workspace_mb, "backend": backend}

    def forward(
        self,
        student_qkv: Mapping[int, QKV],
        teacher_qkv: Mapping[int, QKV],
        *,
        mask: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> HiddenTerms:
        """Loss of one micro-batch.

        Args:
            student_qkv: {block: (query, key, value)}, each [B, T, H], as the projections return
                them; keys and values of grouped attention may be narrower than the queries.
            teacher_qkv: the same of the teacher; constants.
            mask: [B, T] bool, True for a real token.
            normalizer: replaces the number of real tokens, e.g. by those of the whole step.
        """
        options: dict[str, Any] = {**self.options, "mask": mask, "normalizer": normalizer}
        losses = []
        for student, teacher in self.pairs:
            sides, heads = (student_qkv[student], teacher_qkv[teacher]), self.num_heads
            if self.kind == "minilm":
                assert heads is not None  # `__init__` asked for them
                ours, theirs = (repeat_heads(qkv, heads) for qkv in sides)
                value_weight = self.relation_weights[2]
                loss = minilm_loss(
                    ours, theirs, num_heads=heads, value_weight=value_weight, **options
                )
            else:
                heads = heads or common_heads([x.shape[-1] for qkv in sides for x in qkv])
                loss = minilmv2_loss(
                    *sides, num_heads=heads, weights=self.relation_weights, **options
                )
            losses.append(loss)
        return self.weighted(losses)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, kind={self.kind!r}"


def common_heads(widths: list[int]) -> int:
    """The most relation heads that divide every width and leave 16 columns to each, or 1."""
    common = math.gcd(*widths)
    most = max(min(widths) // _MIN_HEAD_WIDTH, 1)
    return max(heads for heads in range(1, most + 1) if common % heads == 0)


def repeat_heads(qkv: QKV, num_heads: int) -> QKV:
    """Keys and values of grouped attention, each head repeated for the queries that share it."""
    query, key, value = qkv
    width = query.shape[-1] // num_heads

    def repeated(x: Tensor) -> Tensor:
        if x.shape[-1] == query.shape[-1]:
            return x
        if x.shape[-1] % width or num_heads % (x.shape[-1] // width):
            raise ValueError(
                f"num_heads: expected the attention heads, got {num_heads}, which does not fit "
                f"queries of width {query.shape[-1]} and keys of width {x.shape[-1]}"
            )
        groups = num_heads // (x.shape[-1] // width)
        return torch.repeat_interleave(x.unflatten(-1, (-1, width)), groups, dim=-2).flatten(-2)

    return query, repeated(key), repeated(value)

"""Losses of a student's hidden states against a teacher's, with the projections they train."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from modxfer_fast.errors import check_choice
from modxfer_fast.kernels.names import IMPLS, INITS, PROJECTIONS
from modxfer_fast.kernels.projection_loss import projection_loss
from modxfer_fast.kernels.projection_loss.reference import projection_loss_reference
from modxfer_fast.kernels.projection_loss.spec import ProjectionSpec
from modxfer_fast.losses.layer_pairs import HiddenTerms, LayerPairLoss, pair_name


class HiddenProjection(nn.Module):
    """One trainable map from the student's width to the teacher's, and the loss behind it.

    weight [D_t, D_s], or up [D_t, R] and down [R, D_s] whose product it is; bias [D_t] or None;
    fp32. The loss is computed in the module's own call, in which ZeRO-3 gathers the parameters.
    """

    def __init__(
        self,
        student_width: int,
        teacher_width: int,
        rank: int | None,
        bias: bool,
        init: str,
        generator: torch.Generator | None,
    ):
        super().__init__()
        if rank is None:
            self.weight = nn.Parameter(torch.empty(teacher_width, student_width))
        else:
            self.up = nn.Parameter(torch.empty(teacher_width, rank))
            self.down = nn.Parameter(torch.empty(rank, student_width))
        self.bias = nn.Parameter(torch.zeros(teacher_width)) if bias else None
        for factor in self.factors:
            if init == "identity":
                nn.init.eye_(factor)
            elif init == "xavier":
                nn.init.xavier_uniform_(factor, generator=generator)
            else:
                nn.init.orthogonal_(factor, generator=generator)

    @property
    def factors(self) -> tuple[Tensor, ...]:
        """(weight,) or (up, down)."""
        return (self.weight,) if hasattr(self, "weight") else (self.up, self.down)

    def forward(self, student_hidden: Tensor, teacher_hidden: Tensor, compute, **options) -> Tensor:
        factors = self.factors
        projection = factors[0] if len(factors) == 1 else factors
        return compute(student_hidden, teacher_hidden, projection, bias=self.bias, **options)


class HiddenStateLoss(LayerPairLoss):
    """sum over pairs of weight_i * loss(P_i h_student, h_teacher) [/ number of pairs].

    The loss of a pair is `projection_loss`, a mean over the tokens that count. Projections are
    parameters of this module and serve training alone.

    Args:
        layers: {student layer: teacher layer}, counted as in `output_hidden_states`: 0 is the
            embeddings, i the output of block i, -1 that of the last block. See layer_pairs.py.
        student_width, teacher_width: D_s and D_t.
        num_student_layers, num_teacher_layers: blocks of each model; needed for negative layers.
        loss, beta, norm, norm_eps, workspace_mb, backend: as for `projection_loss`.
        weight: one number, or {student layer: number}.
        pair_reduction: "mean" divides the weighted sum by the number of pairs, "sum" does not.
        projection: "none" (equal widths), "full" ([D_t, D_s]) or "low_rank" (rank `rank`).
        rank: of "low_rank".
        bias: whether projections have one; starts at 0.
        shared: one projection for all pairs instead of one each.
        init: "orthogonal", "identity" (ones on the diagonal, cut to the shape) or "xavier".
        generator: random numbers of the initialisation; None takes torch's own.
        impl: "fused", or "eager": plain PyTorch with autograd, to compare.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.

    Example:
        loss_fn = HiddenStateLoss({1: 3, 2: 6}, 128, 256, projection="full", norm="rms")
        terms = loss_fn({1: h1, 2: h2}, {3: t3, 6: t6}, mask=attention_mask.bool())
    """

    def __init__(
        self,
        layers: Mapping[int, int],
        student_width: int,
        teacher_width: int,
        *,
        num_student_layers: int | None = None,
        num_teacher_layers: int | None = None,
        loss: str = "mse",
        beta: float | None = None,
        norm: str = "none",
        norm_eps: float = 1e-6,
        weight: float | Mapping[int, float] = 1.0,
        pair_reduction: str = "mean",
        projection: str = "full",
        rank: int | None = None,
        bias: bool = False,
        shared: bool = False,
        init: str = "orthogonal",
        generator: torch.Generator | None = None,
        workspace_mb: int = 64,
        backend: str | None = None,
        impl: str = "fused",
    ):
        counts = num_student_layers, num_teacher_layers
        super().__init__(layers, *counts, weight, pair_reduction, workspace_mb, backend)
        check_choice("projection", projection, PROJECTIONS)
        check_choice("init", init, INITS)
        check_choice("impl", impl, IMPLS)
        self.spec = ProjectionSpec.checked(loss, beta, norm, norm_eps)
        if projection == "none":
            if student_width != teacher_width:
                raise ValueError(
                    f"projection: expected full or low_rank, because the student is "
                    f"{student_width} wide and the teacher {teacher_width}, got 'none'"
                )
            if bias or shared:
                raise ValueError("bias, shared: expected False without a projection")
        limit = min(student_width, teacher_width)
        if (projection == "low_rank") != (rank is not None) or not 0 < (rank or 1) <= limit:
            raise ValueError(
                f"rank: expected a number from 1 to {limit} with projection 'low_rank' and none "
                f"without, got {rank} with {projection!r}"
            )
        self.impl = impl
        names = [] if projection == "none" else [pair_name(pair) for pair in self.pairs]
        self.projections = nn.ModuleDict(
            {
                name: HiddenProjection(student_width, teacher_width, rank, bias, init, generator)
                for name in (["shared"] if shared and names else names)
            }
        )

    def projection_of(self, pair: tuple[int, int]) -> HiddenProjection | None:
        """The projection of one of `pairs`, None where widths are equal."""
        if "shared" in self.projections:
            return self.projections["shared"]
        return self.projections[pair_name(pair)] if len(self.projections) else None

    def forward(
        self,
        student_hiddens: Mapping[int, Tensor],
        teacher_hiddens: Mapping[int, Tensor],
        *,
        mask: Tensor | None = None,
        normalizer: float | Tensor | None = None,
        num_valid: int | None = None,
    ) -> HiddenTerms:
        """Loss of the states of one micro-batch.

        Args:
            student_hiddens: {layer: [..., D_s]}, every student layer of `pairs`.
            teacher_hiddens: {layer: [..., D_t]}, every teacher layer; constants.
            mask: [...] bool, True where a token counts.
            normalizer: replaces the number of tokens that count, e.g. those of the whole step.
            num_valid: number of True in `mask`, if known on the host.

        `loss="relative"` divides by the teacher's energy over the tokens of this call, also with a
        normalizer.
        """
        losses = []
        counted: dict[str, Any] = {"mask": mask, "normalizer": normalizer, "num_valid": num_valid}
        for student, teacher in self.pairs:
            for name, states, layer in (
                ("student_hiddens", student_hiddens, student),
                ("teacher_hiddens", teacher_hiddens, teacher),
            ):
                if layer not in states:
                    given = ", ".join(map(str, states)) or "none"
                    raise ValueError(f"{name}: expected layer {layer}, got layers {given}")
            sides = student_hiddens[student], teacher_hiddens[teacher]
            losses.append(self.pair_loss((student, teacher), *sides, **counted))
        return self.weighted(losses)

    @torch.no_grad()
    def cosines(
        self,
        student_hiddens: Mapping[int, Tensor],
        teacher_hiddens: Mapping[int, Tensor],
        *,
        mask: Tensor | None = None,
        num_valid: int | None = None,
    ) -> Tensor:
        """[number of pairs] mean cosine of projected and teacher's state, after the loss's norm.

        Args as for `forward`.
        """
        counted: dict[str, Any] = {"mask": mask, "num_valid": num_valid}
        distances = [
            self.pair_loss((s, t), student_hiddens[s], teacher_hiddens[t], loss="cosine", **counted)
            for s, t in self.pairs
        ]
        return 1 - torch.stack(distances)

    def pair_loss(
        self,
        pair: tuple[int, int],
        student_hidden: Tensor,
        teacher_hidden: Tensor,
        *,
        loss: str | None = None,
        mask: Tensor | None = None,
        normalizer: float | Tensor | None = None,
        num_valid: int | None = None,
    ) -> Tensor:
        """Unweighted loss of one pair, for a caller that has the states of one layer at a time.

        Args:
            loss: another than that of the module.
        """
        spec = self.spec if loss is None else dataclasses.replace(self.spec, loss=loss)
        options: dict[str, Any] = {"mask": mask, "normalizer": normalizer}
        compute: Callable[..., Tensor] = _eager_loss
        if self.impl == "eager":
            options["spec"] = spec
        else:
            compute = projection_loss
            options.update(
                loss=spec.loss,
                beta=spec.beta if spec.loss == "smooth_l1" else None,
                norm=spec.norm,
                norm_eps=spec.norm_eps,
                num_valid=None if mask is None else num_valid,
                workspace_mb=self.workspace_mb,
                backend=self.backend,
            )
        projection = self.projection_of(pair)
        if projection is None:
            return compute(student_hidden, teacher_hidden, **options)
        return projection(student_hidden, teacher_hidden, compute, **options)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, loss={self.spec.loss!r}"


def _eager_loss(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    projection: Tensor | tuple[Tensor, Tensor] | None = None,
    *,
    bias: Tensor | None = None,
    spec: ProjectionSpec,
    mask: Tensor | None,
    normalizer: float | Tensor | None,
) -> Tensor:
    """`projection_loss` as one would write it: every state projected, whole, by autograd."""
    dtype = torch.promote_types(student_hidden.dtype, torch.float32)
    cast = student_hidden.dtype
    if isinstance(projection, tuple):
        projection = projection[0].to(cast), projection[1].to(cast)
    elif projection is not None:
        projection = projection.to(cast)
    bias = None if bias is None else bias.to(cast)
    teacher = teacher_hidden.detach().to(cast)
    rows = projection_loss_reference(student_hidden, teacher, projection, bias, spec).to(dtype)
    counts = torch.ones_like(rows) if mask is None else mask.to(dtype)
    rows = torch.where(counts != 0, rows, 0.0)
    divisor = (
        counts.sum() if normalizer is None else torch.as_tensor(normalizer, device=rows.device)
    )
    divisor = torch.where(divisor == 0, 1.0, divisor.to(dtype))
    if spec.loss == "relative":
        nothing, square = torch.zeros_like(teacher), dataclasses.replace(spec, loss="mse")
        energy = projection_loss_reference(nothing, teacher, None, None, square).to(dtype)
        energy = torch.where(counts != 0, energy, 0.0).sum() / counts.sum().clamp(min=1)
        divisor = divisor * torch.where(energy == 0, 1.0, energy)
    return rows.sum() / divisor

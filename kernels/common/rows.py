"""What belongs to the rows of a call, and how it is to run: what travels together through an op."""

from typing import NamedTuple

import torch
from torch import Tensor

from modxfer_fast.kernels.common import packing
from modxfer_fast.kernels.common.checks import check_labels, check_row_tensor
from modxfer_fast.kernels.common.reduction import valid_rows
from modxfer_fast.kernels.common.scalars import check_number, check_workspace, is_finite
from modxfer_fast.kernels.dispatch import check_name
from modxfer_fast.kernels.names import GRADIENTS


class Tokens(NamedTuple):
    """What a user says of the tokens of a batch and of their mean; as `linear_kd_loss` has it."""

    labels: Tensor | None = None
    token_weights: Tensor | None = None
    normalizer: float | Tensor | None = None
    reduction: str = "mean"
    ignore_index: int = -100
    num_valid: int | None = None

    def check(self, ce_weight: float, name: str, like: Tensor) -> None:
        """Raises ValueError or TypeError beside states `like` [..., D], the argument `name`."""
        lead = like.shape[:-1]
        check_labels(self.labels, ce_weight, self.ignore_index)
        check_row_tensor("labels", self.labels, lead, name, like)
        check_row_tensor("token_weights", self.token_weights, lead, name, like)
        if self.num_valid is not None and self.labels is None:
            raise ValueError(
                f"num_valid: expected labels to count, got num_valid={self.num_valid} alone"
            )


class Rows(NamedTuple):
    """The rows of a loss of logits.

    Attributes:
        labels: [N] int64, or None where every row counts and there is no cross entropy.
        row_weights: [N] fp32 or fp64, the factor of each row's loss; 0 where it does not count.
        ignore_index: the label of rows that do not count.
        num_valid: how many do, where the host knows it.
        softening: [N, 2], its dtype: of rows with a temperature each, it and a factor of kd_weight.
    """

    labels: Tensor | None
    row_weights: Tensor
    ignore_index: int
    num_valid: int | torch.SymInt | None
    softening: Tensor | None = None

    def valid(self) -> Tensor | None:
        """[N] bool: rows that count; None when every row does."""
        return valid_rows(self.labels, self.ignore_index)

    def take(
        self, span: slice, index: Tensor | None
    ) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """(labels, row_weights, softening) of a chunk; arguments as of `packing.take`."""
        labels, softening = self.labels, self.softening
        return (
            None if labels is None else packing.take(labels, span, index),
            packing.take(self.row_weights, span, index),
            None if softening is None else packing.take(softening, span, index),
        )


class Launch(NamedTuple):
    """How a loss of logits is to be computed; nothing of it changes what the loss is.

    Attributes:
        workspace_mb: MiB for the logits in flight; None takes what suits the device, see
            `chunks.budget_for`.
        backend: None takes the best available.
        gradients: a name of `GRADIENTS`, when the gradients are made.
        filter_eps: None, or what dlogits may have and be left out (linear_kd_loss/class_filter.py).
    """

    workspace_mb: int | None = None
    backend: str | None = None
    gradients: str = GRADIENTS[0]
    filter_eps: float | None = None

    def check(self) -> None:
        """Raises ValueError or TypeError for what a user gave."""
        if self.workspace_mb is not None:
            check_workspace(self.workspace_mb)
        check_name(self.backend)
        if self.gradients not in GRADIENTS:
            raise ValueError(
                f"gradients: expected one of {', '.join(GRADIENTS)}, got {self.gradients!r}"
            )
        if self.filter_eps is not None:
            check_number("filter_eps", self.filter_eps)
            if not (self.filter_eps > 0.0 and is_finite(self.filter_eps)):
                raise ValueError(
                    f"filter_eps: expected a positive number or None, got {self.filter_eps}"
                )

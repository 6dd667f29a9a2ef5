"""`linear_kd_loss` as a module that holds its options."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from modxfer_fast.kernels.common import KDSpec, check_integer, check_reduction
from modxfer_fast.kernels.common.composed_head import head_of
from modxfer_fast.kernels.common.parallel_head import Weight
from modxfer_fast.kernels.common.rows import Launch, Tokens
from modxfer_fast.kernels.divergences import DivergenceOption
from modxfer_fast.kernels.linear_kd_loss import loss_alone
from modxfer_fast.kernels.linear_kd_loss.teachers import Teacher, teacher_of
from modxfer_fast.kernels.linear_kd_loss.vocabulary import Vocabulary


class LinearKDLoss(nn.Module):
    """Holds the options of `linear_kd_loss`; called with hidden states and heads.

    Options, defaults and errors are those of `linear_kd_loss`. The module has no parameters.

    Example:
        loss_fn = LinearKDLoss(divergence="jsd", beta=0.5, temperature=2.0)
        loss = loss_fn(h_s, student.lm_head.weight, h_t, teacher.lm_head.weight, labels=labels)
    """

    def __init__(
        self,
        *,
        divergence: DivergenceOption = "forward_kl",
        alpha: float | None = None,
        beta: float | None = None,
        temperature: float = 1.0,
        kd_weight: float = 1.0,
        ce_weight: float = 0.0,
        label_smoothing: float = 0.0,
        z_loss_weight: float = 0.0,
        student_logit_scale: float = 1.0,
        student_softcap: float | None = None,
        teacher_logit_scale: float = 1.0,
        teacher_softcap: float | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        scale_by_temperature_squared: bool = False,
        workspace_mb: int | None = None,
        gradients: str = "forward",
        filter_eps: float | None = None,
        vocabulary: str = "equal",
        backend: str | None = None,
    ):
        super().__init__()
        if isinstance(temperature, Tensor):
            raise TypeError(
                "temperature: expected a number, got a tensor; one of each token's own is an "
                "argument of the call"
            )
        self.spec = KDSpec(
            divergence,
            alpha=alpha,
            beta=beta,
            temperature=temperature,
            kd_weight=kd_weight,
            ce_weight=ce_weight,
            label_smoothing=label_smoothing,
            z_loss_weight=z_loss_weight,
            student_logit_scale=student_logit_scale,
            student_softcap=student_softcap,
            teacher_logit_scale=teacher_logit_scale,
            teacher_softcap=teacher_softcap,
            scale_by_temperature_squared=scale_by_temperature_squared,
        )
        self.tokens = Tokens(reduction=reduction, ignore_index=ignore_index)
        self.launch = Launch(workspace_mb, backend, gradients, filter_eps)
        self.vocabulary = Vocabulary(vocabulary)
        self.spec.checked()
        self.vocabulary.check()
        check_integer("ignore_index", ignore_index)
        check_reduction(reduction, None)
        self.launch.check()

    def forward(
        self,
        student_hidden: Tensor,
        student_weight: Weight,
        teacher_hidden: Tensor | Teacher,
        teacher_weight: Weight | None = None,
        *,
        labels: Tensor | None = None,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
        token_weights: Tensor | None = None,
        normalizer: float | torch.Tensor | None = None,
        num_valid: int | None = None,
        teacher_ids: Tensor | None = None,
        temperature: Tensor | None = None,
    ) -> Tensor:
        """The loss; arguments, result and errors are those of `linear_kd_loss`.

        Args:
            temperature: [...], one a token, in the place of the module's.
        """
        spec = self.spec
        if temperature is not None:
            spec = dataclasses.replace(spec, temperature=temperature)
        tokens = self.tokens._replace(
            labels=labels, token_weights=token_weights, normalizer=normalizer, num_valid=num_valid
        )
        return loss_alone(
            head_of(student_hidden, student_weight, student_bias),
            teacher_of(teacher_hidden, teacher_weight, teacher_bias),
            spec,
            tokens,
            self.launch,
            self.vocabulary._replace(teacher_ids=teacher_ids),
        )

    @property
    def options(self) -> Mapping[str, Any]:
        """What the module was built with, by name; to change one, replace `spec`, say."""
        tokens = {"ignore_index": self.tokens.ignore_index, "reduction": self.tokens.reduction}
        options = {**self.spec.options(), **tokens, **self.launch._asdict()}
        options["vocabulary"] = self.vocabulary.vocabulary
        return MappingProxyType(options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())

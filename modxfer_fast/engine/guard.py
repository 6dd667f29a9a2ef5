"""Updates that are not finite: left out, counted, named, and bounded."""

import math
from collections.abc import Callable
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.utils import logging

from modxfer_fast.errors import NonFiniteError
from modxfer_fast.kernels.common.gathered import full_tensor
from modxfer_fast.models.checks import listed, nonfinite_parameters

logger = logging.get_logger(__name__)


class StepGuard(TrainerCallback):
    """Leaves out optimiser steps whose gradient is not finite, and stops after too many in a row.

    DeepSpeed and the loss scaler of fp16 skip such steps themselves, without a word; everywhere
    else the optimiser would write NaN into every parameter. The decision costs one synchronisation
    a step, as DeepSpeed's own does, and is the same on all ranks because it is taken on reduced
    gradients. A skipped step takes no part in the mean loss either.

    A step that the scaler skips though every loss was finite, while its scale is still at least 1,
    is the scaler finding its scale: it is skipped and counted, but not as one in a row.

    Args:
        max_skipped: consecutive skipped steps that are tolerated.
        module: the DistillModule, whose meter knows which term was not finite.
        reduce: sums a tensor over the ranks.
        count_loss: takes the loss of each step that is not skipped, a device scalar.
        explain: what broke first in the step of this number, as text. Collective.
    """

    def __init__(
        self,
        max_skipped: int,
        module: nn.Module,
        reduce: Callable[[Tensor], Tensor],
        count_loss: Callable[[Tensor], None],
        explain: Callable[[int], str] = lambda step: "",
    ):
        self.max_skipped = max_skipped
        self.engine: Any = None  # the DeepSpeed engine, once there is one
        self._scaled: AcceleratedOptimizer | None = None  # whose scaler may skip its steps
        self._module = module
        self._reduce = reduce
        self._dropped = False
        self._count_loss, self._explain = count_loss, explain
        self.restart(skipped=0)

    def restart(self, skipped: int) -> None:
        """A training begins, before which `skipped` steps were skipped."""
        self.skipped, self.consecutive = skipped, 0
        self._why = ""  # of the first of the steps that were skipped in a row
        self._loss: Tensor | None = None  # of the step so far
        self.unreported = 0, 0  # steps, and those taken, since the last report

    def add_loss(self, loss: Tensor) -> None:
        """Adds the loss of a micro-batch to that of its step."""
        self._loss = loss if self._loss is None else self._loss + loss

    def steps_per_taken(self) -> float:
        """Steps per step that was not skipped, since the last call; NaN where all were."""
        steps, taken = self.unreported
        self.unreported = 0, 0
        return steps / taken if taken else math.nan

    def _end_step(self, *, taken: bool) -> None:
        loss, self._loss = self._loss, None
        self.unreported = self.unreported[0] + 1, self.unreported[1] + taken
        if taken and loss is not None:
            # once in Trainer's sum, a NaN would never leave it
            self._count_loss(torch.where(loss.isfinite(), loss, 0.0))

    def watch(self, optimizer: AcceleratedOptimizer) -> None:
        """Guards an optimiser whose gradients are reduced, whole on all ranks or sharded."""
        self._scaled = None if optimizer.scaler is None else optimizer
        _torch_optimizer(optimizer).register_step_pre_hook(self._drop_nonfinite_gradients)

    def _drop_nonfinite_gradients(self, optimizer, args, kwargs) -> None:
        params = [p for group in optimizer.param_groups for p in group["params"]]
        params = [p for p in params if p.grad is not None]
        if params and not _total_norm(params).isfinite():
            # a parameter without a gradient is left alone, its moments and its weight decay too
            for p in params:
                p.grad = None
            self._dropped = True

    def on_optimizer_step(self, args, state, control, **kwargs):
        by_deepspeed = self.engine is not None and not self.engine.was_step_applied()
        by_scaler = self._scaled is not None and self._scaled.step_was_skipped
        is_taken = not (self._dropped or by_deepspeed or by_scaler)
        is_calibration = by_scaler and self._is_scale_too_large()
        self._end_step(taken=is_taken)
        if is_taken:
            self.consecutive = 0
            return
        self._dropped = False
        self.skipped += 1
        if is_calibration:
            logger.warning(
                f"step {state.global_step + 1}: update skipped, the loss scale was too large"
            )
            return
        self.consecutive += 1
        step, cause = state.global_step + 1, self._cause(args.device)
        if self.consecutive == 1:
            self._why = self._explain(step)
        message = f"step {step}: update skipped, {cause}{self._why}"
        logger.warning(message)
        if self.consecutive > self.max_skipped:
            raise NonFiniteError(
                f"{message}; {self.consecutive} updates in a row were not finite, "
                f"max_skipped_steps={self.max_skipped}{self._broken_parameters()}"
            )

    def _is_scale_too_large(self) -> bool:
        """Whether a step skipped by the scaler is owed to its scale; the same on all ranks."""
        assert self._loss is not None  # the step had one
        assert self._scaled is not None
        broken = (~self._loss.isfinite()).float()  # a loss of one rank breaks the gradient of all
        return not self._reduce(broken) and self._scaled.scaler.get_scale() >= 1.0

    def _cause(self, device: torch.device) -> str:
        sums = self._module.meter.totals(self._reduce, device)
        if sums["nonfinite_teacher"]:
            return (
                "the teacher's hidden states were not finite in "
                f"{sums['nonfinite_teacher']:.0f} micro-batches since the last report"
            )
        if not sums["nonfinite"]:
            return "the gradient was not finite though every loss was"
        # pairs of layers only where one is to blame, since there may be many
        terms = [
            name
            for name in self._module.meter.names
            if name in ("kd", "ce") or name.endswith("_loss") or sums[f"nonfinite_{name}"]
        ]
        parts = ", ".join(f"{name} in {sums[f'nonfinite_{name}']:.0f}" for name in terms)
        return (
            f"the loss was not finite in {sums['nonfinite']:.0f} micro-batches since the last "
            f"report ({parts})"
        )

    def _broken_parameters(self) -> str:
        names = nonfinite_parameters(self._module)
        if self._module.teacher is not None:
            names += [f"teacher.{name}" for name in self._module.teacher.nonfinite_parameters()]
        return f"; parameters that are not finite: {listed(names)}" if names else ""


def _total_norm(params: list[Any]) -> Tensor:
    return full_tensor(torch.nn.utils.get_total_norm([p.grad for p in params]))


def _torch_optimizer(optimizer) -> torch.optim.Optimizer:
    """The torch optimiser whose `step` runs, inside Accelerate's and DeepSpeed's wrappers."""
    while not isinstance(optimizer, torch.optim.Optimizer) or hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer

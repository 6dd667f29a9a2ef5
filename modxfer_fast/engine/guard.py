"""Updates that are not finite: left out, counted, named, and bounded."""

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.utils import logging

logger = logging.get_logger(__name__)


class NonFiniteError(RuntimeError):
    """Too many updates in a row were not finite."""


class StepGuard(TrainerCallback):
    """Leaves out optimiser steps whose gradient is not finite, and stops after too many in a row.

    DeepSpeed skips such steps itself, without a word; everywhere else the optimiser would write NaN
    into every parameter. The decision costs one synchronisation a step, as DeepSpeed's own does,
    and is the same on all ranks because it is taken on reduced gradients.

    Args:
        max_skipped: consecutive skipped steps that are tolerated.
        module: the DistillModule, whose meter knows which term was not finite.
        reduce: sums a tensor over the ranks.
    """

    def __init__(self, max_skipped: int, module: nn.Module, reduce):
        self.max_skipped = max_skipped
        self.skipped = 0
        self.consecutive = 0
        self.engine = None  # the DeepSpeed engine, once there is one
        self._module = module
        self._reduce = reduce
        self._dropped = False

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """Guards a torch optimiser whose gradients are whole and equal on all ranks."""
        optimizer.register_step_pre_hook(self._drop_nonfinite_gradients)

    def _drop_nonfinite_gradients(self, optimizer, args, kwargs) -> None:
        params = [p for group in optimizer.param_groups for p in group["params"]]
        params = [p for p in params if p.grad is not None]
        if params and not torch.nn.utils.get_total_norm([p.grad for p in params]).isfinite():
            # a parameter without a gradient is left alone, its moments and its weight decay too
            for p in params:
                p.grad = None
            self._dropped = True

    def on_optimizer_step(self, args, state, control, **kwargs):
        by_deepspeed = self.engine is not None and not self.engine.was_step_applied()
        if not (self._dropped or by_deepspeed):
            self.consecutive = 0
            return
        self._dropped = False
        self.skipped += 1
        self.consecutive += 1
        cause = self._cause(args.device)
        message = f"step {state.global_step + 1}: update skipped, {cause}"
        logger.warning(message)
        if self.consecutive > self.max_skipped:
            raise NonFiniteError(
                f"{message}; {self.consecutive} updates in a row were not finite, "
                f"max_skipped_steps={self.max_skipped}{self._broken_parameters()}"
            )

    def _cause(self, device: torch.device) -> str:
        sums = self._module.meter.totals(self._reduce, device)
        if not sums["nonfinite"]:
            return "the gradient was not finite though every loss was"
        # pairs of layers only where one is to blame, since there may be many
        features = [
            name
            for name in self._module.meter.features
            if name.endswith("_loss") or sums[f"nonfinite_{name}"]
        ]
        terms = ["kd", "ce", *features]
        parts = ", ".join(f"{name} in {sums[f'nonfinite_{name}']:.0f}" for name in terms)
        return (
            f"the loss was not finite in {sums['nonfinite']:.0f} micro-batches since the last "
            f"report ({parts})"
        )

    def _broken_parameters(self) -> str:
        names = [n for n, p in self._module.named_parameters() if not p.isfinite().all()]
        return f"; parameters that are not finite: {', '.join(names[:5])}" if names else ""

"""A frozen teacher whose parameters are divided over the ranks, ZeRO-3's way, whatever the student
does: a block of its network is whole on a rank while that rank calls it, and the next one comes
meanwhile.

DeepSpeed partitions and gathers; its engine for inference is not used, because it leaves state
behind that breaks the training engine made after it.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from modxfer_fast.engine import deepspeed
from modxfer_fast.engine.batch import Answer, Batch
from modxfer_fast.engine.features.taps import LayerTaps
from modxfer_fast.engine.teachers.replica import Teacher
from modxfer_fast.models.checks import is_partitioned


class ShardedTeacher(Teacher):
    """A model that no rank has whole.

    All ranks construct it, and ask it, together and equally often: to be whole a block is gathered
    from all of them.

    Args:
        model, kind, num_tokens: as of `Teacher`. Parameters that are whole are divided in place;
            under `deepspeed.loading_in_parts` they never were.
        offload: keep the parts in the memory of the host.
    """

    is_collective = True

    def __init__(
        self,
        model: nn.Module,
        kind: str = "causal_lm",
        num_tokens: int | None = None,
        *,
        offload: bool = False,
    ):
        deepspeed.partition(model, offload=offload)
        super().__init__(model, kind, num_tokens)
        self._units = _Units(self._parts.backbone)

    def _settle(self, model: nn.Module) -> None:
        """Its parts stay where they are."""

    def to(self, device: torch.device) -> "ShardedTeacher":
        for buffer in self.model.buffers():  # a parameter comes to the device as it is gathered
            buffer.data = buffer.data.to(device)
        return self

    def nonfinite_parameters(self) -> list[str]:
        broken = []
        for name, param in self.model.named_parameters():
            with deepspeed.gathered([param]):
                if not param.isfinite().all():
                    broken.append(name)
        return broken

    def answer(self, batch: Batch, taps: LayerTaps | None = None) -> Answer:
        with self._units.gathered_on_call():
            answer = super().answer(batch, taps)
        if answer.head is None:
            return answer
        # whole for as long as the loss needs it, and no longer
        weight, bias = answer.head
        with deepspeed.gathered([weight, bias]):
            bias = None if bias is None else bias.detach().clone()
            return answer._replace(head=(weight.detach().clone(), bias))


class _Units:
    """What is gathered together: each block of the backbone, and each module outside of them."""

    def __init__(self, backbone: nn.Module):
        blocks = set(LayerTaps(backbone, "teacher").blocks)
        inside = {module for block in blocks for module in block.modules()} - blocks
        self._units: list[tuple[nn.Module, list[Any]]] = []
        for module in backbone.modules():  # the head is gathered for the loss alone
            if module in inside:
                continue
            params = module.parameters(recurse=module in blocks)
            if own := [param for param in params if is_partitioned(param)]:
                self._units.append((module, own))
        self._handles: dict[int, Any] = {}  # of units that come or have come

    @contextlib.contextmanager
    def gathered_on_call(self) -> Iterator[None]:
        """Inside, a unit is whole while it is called."""
        hooks = []
        for index, (module, _) in enumerate(self._units):
            hooks += [
                module.register_forward_pre_hook(lambda *_, i=index: self._enter(i)),
                module.register_forward_hook(lambda *_, i=index: self._leave(i), always_call=True),
            ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for index in list(self._handles):  # that came and were not called
                self._leave(index)

    def _enter(self, index: int) -> None:
        self._start(index)
        self._wait(index)
        if index + 1 < len(self._units):
            self._start(index + 1)

    def _start(self, index: int) -> None:
        if index not in self._handles:
            _, params = self._units[index]
            self._handles[index] = params[0].all_gather_coalesced(params)

    def _wait(self, index: int) -> None:
        if self._handles[index] is not None:
            self._handles[index].wait()
            self._handles[index] = None

    def _leave(self, index: int) -> None:
        self._wait(index)
        del self._handles[index]
        _, params = self._units[index]
        params[0].partition(params)

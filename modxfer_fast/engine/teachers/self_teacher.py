"""The student's own network as its teacher: without its adapters, with those it began with, or with
a moving average of them. There is no second model in memory.

While the teacher answers, adapters are off, or modules with other parameters stand in the place of
those that train. What the student is made of, its flags of training and of gradients, and its
random numbers are then as before.
"""

import contextlib
import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from modxfer_fast.config.model import SOURCES
from modxfer_fast.engine.batch import Answer, Batch
from modxfer_fast.engine.deepspeed import gathered, gathered_as
from modxfer_fast.engine.features.taps import LayerTaps
from modxfer_fast.engine.students import student_of_kind
from modxfer_fast.kernels.common.gathered import full_tensor, is_dtensor
from modxfer_fast.models.checks import listed

FILE = "self_teacher.safetensors"  # beside the student


@dataclass(frozen=True)
class SelfDistillation:
    """A student with adapters learns from its own network.

    Attributes:
        source: "base" for the network without adapters, "start" for the adapters as they were
            before training, "ema" for an exponential moving average of them, which moves after each
            optimiser step that is taken.
        ema_decay: share of the average that a step keeps.
    """

    source: str = "base"
    ema_decay: float = 0.999

    def __post_init__(self):
        if self.source not in SOURCES:
            raise ValueError(f"source: expected one of {', '.join(SOURCES)}, got {self.source!r}")
        if not 0.0 <= self.ema_decay < 1.0:
            raise ValueError(f"ema_decay: expected in [0, 1), got {self.ema_decay}")

    def of(self, student: nn.Module, kind: str) -> "SelfTeacher":
        """The teacher of this student, as its parameters are now."""
        return SelfTeacher(student, self, kind)


class SelfTeacher:
    """The network of a student with other adapters, or none; see `SelfDistillation`.

    Averages and starts are kept whole on every rank, in fp32, whatever divides the student.

    Args:
        student: PeftModel, before an engine wraps or divides it.
        options: what teaches.
        kind: of the student.

    Raises:
        ValueError: a student without adapters, or, with source "base", one that trains more.
    """

    num_tokens: int | None = None

    @property
    def is_collective(self) -> bool:
        """Whether ranks answer together: those that ZeRO-3 or FSDP2 divides the student over."""
        params = self.student.parameters()
        return any(hasattr(param, "ds_id") or is_dtensor(param) for param in params)

    def __init__(self, student: nn.Module, options: SelfDistillation, kind: str = "causal_lm"):
        if not isinstance(student, PeftModel):
            raise ValueError(
                "teacher: expected a student with adapters (peft) to teach itself, got a "
                f"{type(student).__name__} that trains whole; its start is a teacher with plan "
                "replica"
            )
        trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
        if options.source == "base":
            outside = _outside_adapters(student, trained)
            if outside:
                raise ValueError(
                    "teacher: expected source start or ema, because the base trains too "
                    f"({listed(outside)}), got base"
                )
        self.student, self.options, self.kind = student, options, kind
        self._device: torch.device | None = None  # where the student is; None: where it was made
        kept = {} if options.source == "base" else trained
        with gathered(kept.values()):
            self._keep({name: p.detach().to(torch.float32, copy=True) for name, p in kept.items()})

    def _keep(self, values: dict[str, Tensor]) -> None:
        self._values = values
        self._stand_ins = _StandIns(self.student, values)
        with self._in_place():
            self._parts = student_of_kind(self.kind).of(self.student, "teacher")

    @property
    def classes(self) -> Any:
        return self._parts.classes

    def to(self, device: torch.device) -> "SelfTeacher":
        self._device = device
        for value in self._values.values():
            value.data = value.data.to(device)
        return self

    def nonfinite_parameters(self) -> list[str]:
        """Of those that are kept; the others are the student's."""
        return [name for name, value in self._values.items() if not value.isfinite().all()]

    def uncalled_parameters(self) -> Iterable[nn.Parameter]:
        """What a loss reads though the module that holds it is never called."""
        return self._parts.uncalled_parameters()

    def taps(self) -> LayerTaps:
        return LayerTaps(self._parts.backbone, "teacher")

    @torch.no_grad()
    def answer(self, batch: Batch, taps: LayerTaps | None = None) -> Answer:
        """Runs the student's network as the teacher; the answer's head holds its own tensors."""
        with self._in_place():
            return self._parts.answer(*batch.for_teacher, taps)

    @contextlib.contextmanager
    def _in_place(self) -> Iterator[None]:
        """Inside, the student's network is the teacher, in evaluation mode."""
        modules = list(self.student.modules())
        training = [module for module in modules if module.training]
        for module in training:
            module.training = False
        places = (
            _without_adapters(modules)
            if self.options.source == "base"
            else self._stand_ins.in_place()
        )
        try:
            with places:
                yield
        finally:
            for module in training:
                module.training = True

    @torch.no_grad()
    def follow(self) -> None:
        """Moves the average, after an optimiser step that was taken. Collective where it divides
        the student."""
        if self.options.source != "ema":
            return
        weight, kept = 1.0 - self.options.ema_decay, self._stand_ins.kept
        with gathered(each.trained for each in kept):
            for each in kept:
                each.value.lerp_(full_tensor(each.trained.detach()).to(each.value), weight)
        self._stand_ins.renew()

    def save(self, folder: str | Path, file: str = FILE) -> None:
        """Writes what is kept; of source "base" nothing."""
        if self._values:
            values = {name: value.cpu().contiguous() for name, value in self._values.items()}
            save_file(values, Path(folder) / file)

    def load(self, folder: str | Path, file: str = FILE) -> None:
        """Takes what was saved in `folder`.

        Raises:
            ValueError: there is none.
        """
        if self.options.source == "base":
            return
        path = Path(folder) / file
        if not path.is_file():
            raise ValueError(
                f"resume_from_checkpoint: expected {file} in {folder}, because the teacher is the "
                f"{self.options.source} of the student; found none"
            )
        found = load_file(path)
        if found.keys() != self._values.keys():  # a student that does not train
            self._keep({name: value.to(self._device) for name, value in found.items()})
            return
        for name, value in self._values.items():
            value.copy_(found[name])
        self._stand_ins.renew()


class _Kept(NamedTuple):
    """A parameter of the teacher: its stand-in, its value, and where the student has its own."""

    stand_in: nn.Parameter
    value: Tensor
    parameters: dict[str, nn.Parameter | None]  # of the module in which the student has its own
    key: str

    @property
    def trained(self) -> nn.Parameter:
        """The student's."""
        param = self.parameters[self.key]
        assert param is not None
        return param

    def renew(self) -> None:
        self.stand_in.data = self.value.to(self.trained.dtype)  # the same memory in the same dtype


class _StandIns:
    """Modules that stand in the place of those whose own parameters are given other values.

    A parameter is renewed where an engine has changed the dtype of the student's. FSDP2 puts other
    parameters in the place of the student's, so these are looked up where they are.
    """

    def __init__(self, student: nn.Module, values: dict[str, Tensor]):
        self.kept: list[_Kept] = []
        others = {}
        for name, value in values.items():
            path, _, key = name.rpartition(".")
            stand_in = nn.Parameter(value, requires_grad=False)
            kept = _Kept(stand_in, value, student.get_submodule(path)._parameters, key)
            self.kept.append(kept)
            others[id(kept.trained)] = stand_in
        made: dict[int, nn.Module] = {}
        for module in student.modules():
            own = {
                key: others[id(param)]
                for key, param in module._parameters.items()
                if id(param) in others
            }
            if own:
                made[id(module)] = _copy_with(module, own)
        self._places = [
            (parent._modules, key, module, made[id(module)])
            for parent in student.modules()
            for key, module in parent._modules.items()
            if id(module) in made
        ]
        self.renew()

    def renew(self) -> None:
        """Parameters have the values that are kept, in the dtype of the student's."""
        for kept in self.kept:
            kept.renew()

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        for kept in self.kept:
            own = kept.stand_in
            if own.dtype != kept.trained.dtype or own.device != kept.value.device:
                kept.renew()
        for modules, key, _, stand_in in self._places:
            modules[key] = stand_in
        try:
            yield
        finally:
            for modules, key, module, _ in self._places:
                modules[key] = module


def _copy_with(module: nn.Module, own: dict[str, nn.Parameter]) -> nn.Module:
    """Shares everything with a module but some parameters, and hooks that are yet to come."""
    made = copy.copy(module)
    for name, value in vars(module).items():
        if "hooks" in name and isinstance(value, dict):
            made.__dict__[name] = copy.copy(value)
    made.__dict__["_parameters"] = {**module._parameters, **own}
    made.training = False
    shared = [name for name, p in module._parameters.items() if p is not None and name not in own]
    if shared:  # which an engine may divide with the rest of the student

        def before(stand_in, inputs):
            stand_in._parameters |= {name: module._parameters[name] for name in shared}

        made.register_forward_pre_hook(before)
        gathered_as(made, module)
    return made


@contextlib.contextmanager
def _without_adapters(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Not by PEFT's own switch, which also changes what requires a gradient."""
    switched: list[Any] = [
        module
        for module in modules
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
        and not module.disable_adapters
    ]
    for module in switched:
        module._disable_adapters = True
    try:
        yield
    finally:
        for module in switched:
            module._disable_adapters = False


def _outside_adapters(student: nn.Module, trained: dict[str, nn.Parameter]) -> list[str]:
    """Names of trained parameters that the network without adapters has too."""
    inside: set[int] = set()
    for module in student.modules():
        if isinstance(module, BaseTunerLayer):
            layers = [getattr(module, name, None) for name in module.adapter_layer_names]
            own = [
                p for layer in layers if isinstance(layer, nn.Module) for p in layer.parameters()
            ]
        elif isinstance(module, AuxiliaryTrainingWrapper):
            original = {id(param) for param in module.original_module.parameters()}
            own = [param for param in module.parameters() if id(param) not in original]
        else:
            continue
        inside |= {id(param) for param in own}
    return [name for name, param in trained.items() if id(param) not in inside]

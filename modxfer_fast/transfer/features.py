"""The features of chosen spaces of chosen blocks, taken while a model runs once.

Each is reduced to rows as soon as it is there, so that of every place only rows outlive the block.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from modxfer_fast.models import Architecture
from modxfer_fast.models.architecture import ROLES, max_tokens, without_peft
from modxfer_fast.models.taps import Tap, tapped
from modxfer_fast.transfer.errors import TransferError

Reduce = Callable[[Tensor], Tensor]


class Site(NamedTuple):
    """A space of one block."""

    space: str
    layer: int


class FeatureTaps:
    """Takes features of a transformers model, or of one with PEFT around it.

    A space that a linear writes is that linear's output. With PEFT around the linear this is the
    output with the module, unless the module is switched off (`bare`).

    Args:
        sites: where to take them. role: "teacher" or "student", the name that errors use.

    Raises:
        TransferError: a space or layer that the model does not have.
    """

    def __init__(self, model: nn.Module, sites: Iterable[Site], role: str):
        self._architecture = Architecture.of(model)
        self._model = without_peft(model)
        self.device = self._model.device
        self.role = role
        self.sites = tuple(sites)
        spaces, num_layers = self._architecture.spaces, self._architecture.num_layers
        for space, layer in self.sites:
            if space not in spaces:
                raise TransferError(
                    f"spaces: the {role} ({self._architecture.family}) has {', '.join(spaces)}; "
                    f"got {space!r}"
                )
            if not 0 <= layer < num_layers:
                raise TransferError(
                    f"layer_pairs: the {role} has layers 0 to {num_layers - 1}, got {layer}"
                )
        self._max_tokens = max_tokens(self._model.config.get_text_config())
        # the head reads features and makes none
        self._backbone = self._model.base_model
        self._accepted = set(inspect.signature(self._backbone.forward).parameters)

    @property
    def widths(self) -> tuple[int, ...]:
        """Features of each site."""
        return tuple(self._architecture.width(site.space) for site in self.sites)

    def run(self, inputs: Mapping[str, Tensor], reduce: Reduce) -> list[Tensor]:
        """`reduce` of the features [B, T, width] of each site, in the order of `sites`.

        Args:
            inputs: as a tokenizer gives them, [B, T]; those that the model does not know are left
                out, such as the token types of a family without them.

        Raises:
            TransferError: more tokens than the model has positions for; a block that did not run or
                ran more than once; features that are not [B, T, width].
        """
        shape = inputs["input_ids"].shape
        if self._max_tokens is not None and shape[1] > self._max_tokens:
            raise TransferError(
                f"max_length: the {self.role} reads at most {self._max_tokens} tokens, "
                f"got {shape[1]}"
            )
        known: dict[str, Any] = {
            name: value for name, value in inputs.items() if name in self._accepted
        }
        if "use_cache" in self._accepted:
            known["use_cache"] = False
        taken: dict[Site, Tensor] = {}

        def take(site: Site, features: Tensor) -> None:
            expected = (*shape, self._architecture.width(site.space))
            if site in taken or features.shape != expected:
                raise TransferError(
                    f"{self.role}: expected {site.space} of layer {site.layer} once, as "
                    f"{list(expected)}, got {list(features.shape)}"
                    + (" a second time" if site in taken else "")
                )
            taken[site] = reduce(features)

        with tapped({site: self._tap(site) for site in self.sites}, take):
            self._backbone(**known)
        missing = [site for site in self.sites if site not in taken]
        if missing:
            raise TransferError(
                f"{self.role}: expected block {missing[0].layer} to run in the forward pass; "
                f"its {missing[0].space} was not computed"
            )
        return [taken[site] for site in self.sites]

    def _tap(self, site: Site) -> Tap:
        """The block itself, or the first of its linears that reads or writes the space."""
        block = self._architecture.layer_module(self._model, site.layer)
        if site.space == "layer_out":
            return Tap(block)
        role = next(role for role in self._architecture.modules if site.space in ROLES[role])
        linear = _inside(block, self._architecture.modules[role])
        return Tap(linear, of_output=ROLES[role].writes == site.space)


@contextlib.contextmanager
def observed(model: nn.Module, *, module_active: bool = False) -> Iterator[None]:
    """Evaluation mode without gradients, afterwards everything as it was.

    Args:
        module_active: leave a PEFT module switched on; without it the features are those of the
            bare model.

    Raises:
        TransferError: a module that is merged into the weights, from which it comes out with other
            rounding only.
    """
    if any(getattr(module, "merged_adapters", None) for module in model.modules()):
        raise TransferError(
            "model: expected a PEFT module beside the weights, got one that is merged into them; "
            "call unmerge_adapter() first"
        )
    training = {module: module.training for module in model.modules()}
    trainable = {parameter: parameter.requires_grad for parameter in model.parameters()}
    has_module = hasattr(model, "disable_adapter") and not module_active
    model.eval()
    try:
        with torch.no_grad(), model.disable_adapter() if has_module else contextlib.nullcontext():
            yield
    finally:
        for module, mode in training.items():
            module.training = mode
        # PEFT makes a module that it switches on again trainable
        for parameter, flag in trainable.items():
            parameter.requires_grad_(flag)


def _inside(block: nn.Module, path: str) -> nn.Module:
    """The module at `path`; layers of PEFT that wrap one on the way are passed through."""
    module = block
    for name in path.split("."):
        while not hasattr(module, name) and hasattr(module, "base_layer"):
            module = module.base_layer
        module = getattr(module, name)
    return module

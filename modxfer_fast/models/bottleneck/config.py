"""Configuration of bottleneck adapters."""

import math
import re
from dataclasses import dataclass, field
from typing import ClassVar

from peft import PeftConfig

from modxfer_fast.errors import ModelError, check_choice
from modxfer_fast.models.bottleneck.sites import PLACEMENTS
from modxfer_fast.models.peft import peft_type

NON_LINEARITIES = ("relu", "gelu", "gelu_new", "silu", "swish", "tanh", "leaky_relu", "linear")


@dataclass
class BottleneckConfig(PeftConfig):
    """Adapters `scaling * up(act(down(x)))` inside every block (Houlsby et al. 2019).

    Exactly one of `bottleneck_size` and `reduction_factor` is given.

    Raises:
        ModelError: a value that is not allowed; the message names the field.
    """

    INITS: ClassVar[tuple[str, ...]] = ("bert", "zero_up")

    placement: str = field(
        default="pfeiffer",
        metadata={
            "help": "pfeiffer: one adapter after the FFN. houlsby: one after the attention output, "
            "one after the FFN. parallel: one beside the FFN."
        },
    )
    bottleneck_size: int | None = field(default=None, metadata={"help": "Width of the bottleneck."})
    reduction_factor: float | None = field(
        default=None, metadata={"help": "Hidden width over bottleneck width, rounded down."}
    )
    non_linearity: str = field(
        default="relu", metadata={"help": f"One of {', '.join(NON_LINEARITIES)}."}
    )
    scaling: float | None = field(
        default=None,
        metadata={
            "help": "Factor of the adapter's output. Default 1; for parallel placement 4, which He "
            "et al. 2022 found best beside an FFN."
        },
    )
    dropout: float = field(
        default=0.0, metadata={"help": "Dropout of the adapter's output while training."}
    )
    init_weights: str = field(
        default="bert",
        metadata={
            "help": "bert: both projections N(0, 0.02). zero_up: the up-projection is zero, so the "
            "model starts as it was. Biases are zero."
        },
    )
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Keep only these sites of the placement: paths inside a block (output.dropout) "
            "or full module names; a string is a regular expression for full names."
        },
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Blocks that get adapters, from 0; all by default."}
    )
    modules_to_save: list[str] | None = field(
        default=None,
        metadata={"help": "Other modules to train and save, e.g. a classification head."},
    )

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = peft_type("BOTTLENECK")
        check_choice("placement", self.placement, PLACEMENTS, ModelError)
        check_choice("non_linearity", self.non_linearity, NON_LINEARITIES, ModelError)
        check_choice("init_weights", self.init_weights, self.INITS, ModelError)
        self._check_width()
        if self.scaling is None:
            self.scaling = 4.0 if self.placement == "parallel" else 1.0
        if not is_number(self.scaling) or self.scaling == 0:
            raise ModelError(f"scaling: expected a number other than 0, got {self.scaling!r}")
        if not is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise ModelError(f"dropout: expected a number from 0 to below 1, got {self.dropout!r}")
        self._check_targets()

    def width(self, hidden_size: int) -> int:
        """Width of the bottleneck in a model of this width; ModelError where no unit is left."""
        if self.bottleneck_size is not None:
            return self.bottleneck_size
        assert self.reduction_factor is not None  # one of the two is given
        width = int(hidden_size // self.reduction_factor)
        if width < 1:
            raise ModelError(
                f"reduction_factor: expected at most the hidden width {hidden_size}, "
                f"got {self.reduction_factor}"
            )
        return width

    def _check_width(self):
        size, factor = self.bottleneck_size, self.reduction_factor
        if (size is None) == (factor is None):
            raise ModelError(
                "expected exactly one of bottleneck_size and reduction_factor, "
                f"got bottleneck_size={size!r} and reduction_factor={factor!r}"
            )
        if size is not None and not (is_integer(size) and size > 0):
            raise ModelError(f"bottleneck_size: expected a positive integer, got {size!r}")
        if factor is not None and not (is_number(factor) and factor > 0):
            raise ModelError(f"reduction_factor: expected a positive number, got {factor!r}")

    def _check_targets(self):
        layers = self.layers_to_transform
        for layer in layers if _is_list(layers) else () if layers is None else (layers,):
            if not is_integer(layer) or layer < 0:
                raise ModelError(
                    f"layers_to_transform: expected block indices from 0, got {layers!r}"
                )
        if isinstance(self.target_modules, str):
            try:
                re.compile(self.target_modules)
            except re.error as error:
                raise ModelError(
                    f"target_modules: expected a regular expression, got {self.target_modules!r} "
                    f"({error})"
                ) from error
        else:
            _check_names("target_modules", self.target_modules)
        _check_names("modules_to_save", self.modules_to_save)


def _check_names(name: str, value) -> None:
    if value is not None and not (_is_list(value) and all(isinstance(n, str) for n in value)):
        raise ModelError(f"{name}: expected a list of module names, got {value!r}")


def is_integer(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_list(value) -> bool:
    return isinstance(value, (list, tuple, set))

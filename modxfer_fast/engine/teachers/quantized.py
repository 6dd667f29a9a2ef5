"""A frozen teacher whose blocks keep their linear weights in fewer bits, whole on every rank.

What stands outside the blocks, embeddings, norms and the head, stays as it was loaded: the fused
loss reads the head's weight as it is.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from modxfer_fast.config.model import QUANTIZATIONS
from modxfer_fast.engine.features.taps import LayerTaps
from modxfer_fast.engine.teachers.replica import Teacher
from modxfer_fast.errors import ModelError
from modxfer_fast.models.checks import nonfinite_parameters


class QuantizedTeacher(Teacher):
    """A model of which each linear in a block is stored in 8 or 4 bits a number.

    Args:
        model, kind, num_tokens: as of `Teacher`. The linears are replaced in place.
        quantization: "int8" for torchao's weights with a scale a row, on a CPU or GPU; "nf4" for
            the 4 bits of bitsandbytes in blocks of 64 with a scale each.

    Raises:
        ImportError: the library is not installed.
        ModelError: blocks without an `nn.Linear`, as those of GPT-2.
        ValueError: another quantization.
    """

    def __init__(
        self,
        model: nn.Module,
        kind: str = "causal_lm",
        num_tokens: int | None = None,
        *,
        quantization: str = "int8",
    ):
        quantize = quantizer_of(quantization)
        super().__init__(model, kind, num_tokens)
        blocks = LayerTaps(self._parts.backbone, "teacher").blocks
        if not any(isinstance(module, nn.Linear) for module in blocks.modules()):
            raise ModelError(
                f"teacher: expected blocks with nn.Linear, which quantization {quantization} "
                f"stores in fewer bits, got none in {type(model).__name__}"
            )
        self._broken = nonfinite_parameters(self.model)  # 4 bits hold no NaN
        quantize(blocks)
        self.model.requires_grad_(False)

    def nonfinite_parameters(self) -> list[str]:
        """Names of the parameters with a NaN or an infinity, in what was loaded."""
        return self._broken


def quantizer_of(quantization: str) -> Callable[[nn.Module], Any]:
    """What stores each linear inside a module in this form, in place.

    Raises:
        ImportError: the library is not installed.
        ValueError: another quantization.
    """
    if quantization not in QUANTIZATIONS:
        raise ValueError(
            f"quantization: expected one of {', '.join(QUANTIZATIONS)}, got {quantization!r}"
        )
    return _QUANTIZERS[quantization]()


def stored_bytes(module: nn.Module) -> int:
    """Of its parameters, as they are stored: numbers and scales."""
    return sum(t.numel() * t.itemsize for param in module.parameters() for t in _tensors_of(param))


def stored_bytes_of(weight: Tensor, quantization: str) -> int:
    """What a weight [N, K] takes in this form: its numbers and its scales."""
    numbers = weight.numel()
    if quantization == "int8":
        return numbers + weight.itemsize * len(weight)
    return -(-numbers // 2) + 4 * -(-numbers // 64)


def _tensors_of(param: Any) -> list[Tensor]:
    """The tensors that a parameter consists of."""
    if hasattr(param, "tensor_data_names"):  # torchao's
        return [getattr(param, name) for name in param.tensor_data_names]
    state = getattr(param, "quant_state", None)  # of bitsandbytes
    return [param.data] if state is None else [param.data, state.absmax]


class _Int8Linear(nn.Linear):
    """Of torchao's weight, for which torch's own op is called: beside a student under ZeRO-3
    `F.linear` is one of DeepSpeed's, which knows plain weights alone."""

    def forward(self, input: Tensor) -> Tensor:
        return torch._C._nn.linear(input, self.weight, self.bias)


def _int8() -> Callable[[nn.Module], Any]:
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise ImportError(
            "teacher: quantization int8 needs torchao; pip install 'modxfer-fast[quantized]' "
            f"({error})"
        ) from error
    config = Int8WeightOnlyConfig(set_inductor_config=False)

    def quantize(module: nn.Module) -> None:
        quantize_(module, config)
        for linear in module.modules():
            if type(linear) is nn.Linear:
                linear.__class__ = _Int8Linear

    return quantize


def _nf4() -> Callable[[nn.Module], Any]:
    try:
        import bitsandbytes as bnb
    except ImportError as error:
        raise ImportError(
            "teacher: quantization nf4 needs bitsandbytes; pip install 'modxfer-fast[quantized]' "
            f"({error})"
        ) from error

    def quantize(module: nn.Module) -> None:
        for parent in list(module.modules()):
            for name, linear in list(parent.named_children()):
                if type(linear) is not nn.Linear:
                    continue
                weight, bias = linear.weight.detach(), linear.bias
                made = bnb.nn.Linear4bit(
                    linear.in_features,
                    linear.out_features,
                    bias is not None,
                    compute_dtype=weight.dtype,
                    quant_type="nf4",
                    device="meta",
                )
                made.weight = bnb.nn.Params4bit(
                    weight, requires_grad=False, compress_statistics=False, quant_type="nf4"
                )
                made.bias = bias
                # its numbers are made on the way to a device
                setattr(parent, name, made.to(weight.device).eval())

    return quantize


_QUANTIZERS = {"int8": _int8, "nf4": _nf4}

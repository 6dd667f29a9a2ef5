"""The one table of what models do to the logits of their heads, by entries of configurations.

A model multiplies them by a constant, caps them softly, or first one and then the other. Which of
it a model does is tried on its own forward (engine/students/causal_lm.py); here is only where its
numbers stand. An entry that is not here is a line more in SCALES or CAPS.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeGuard

from modxfer_fast.kernels.common import Bend


def _itself(value: float, config: Any) -> float:
    return value


def _divides(value: float, config: Any) -> float:
    return 1.0 / value


def _is_a_width(value: float, config: Any) -> float:
    return value / config.hidden_size


# entry -> what the logits are multiplied by, in the order in which models are likely to mean it
SCALES: Mapping[str, tuple[Callable[[float, Any], float], ...]] = {
    "logit_scale": (_itself,),  # Cohere
    "logits_scaling": (_divides, _itself),  # Granite, MiniCPM3; HyperCLOVA X multiplies
    "lm_head_multiplier": (_itself,),  # Falcon-H1
    "output_multiplier": (_itself,),  # Muse
    "dim_model_base": (_is_a_width,),  # MiniCPM: hidden states / (hidden_size / dim_model_base)
}
CAPS = (
    "final_logit_softcapping",  # Gemma 2 to 4, VaultGemma, nanochat
    "logits_soft_cap",  # RecurrentGemma
    "output_logit_soft_cap",  # xLSTM
)


def bends_of(config: Any) -> Iterator[Bend]:
    """What a model of this configuration may do to its logits, the likeliest first; each once."""
    config = config.get_text_config()
    scales = [
        meaning(float(value), config)
        for name, meanings in SCALES.items()
        if _is_positive(value := getattr(config, name, None))
        for meaning in meanings
    ]
    caps = [float(value) for name in CAPS if _is_positive(value := getattr(config, name, None))]
    yield from dict.fromkeys(Bend(scale, cap) for cap in (*caps, None) for scale in (*scales, 1.0))


def entries_of(config: Any) -> str:
    """Those entries of the table that the configuration has, for messages."""
    config = config.get_text_config()
    values = ((name, getattr(config, name, None)) for name in (*SCALES, *CAPS))
    return ", ".join(f"{name}={value}" for name, value in values if value is not None)


def _is_positive(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and 0 < value < float("inf")

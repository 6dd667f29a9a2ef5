"""Where things are in a transformer: blocks, their linears, what each linear reads and writes.

A *space* is a place in a block where features live; a *role* is a linear of a block, which reads
one space and writes another. Module names differ between families, roles and spaces do not.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from modxfer_fast.config.transfer_names import SPACES
from modxfer_fast.errors import ModelError
from modxfer_fast.models.families import FAMILIES, POOLER, REFUSED


class Role(NamedTuple):
    """The spaces that a linear reads and writes."""

    reads: str
    writes: str


ROLES: Mapping[str, Role] = MappingProxyType(
    {
        "query": Role("attention_in", "query"),
        "key": Role("attention_in", "key"),
        "value": Role("attention_in", "value"),
        "attention_output": Role("context", "attention_out"),
        "ffn_gate": Role("ffn_in", "ffn_gate"),
        "ffn_up": Role("ffn_in", "ffn_up"),
        "ffn_down": Role("ffn_inner", "ffn_out"),
    }
)

RESIDUAL_SPACES = ("attention_in", "attention_out", "ffn_in", "ffn_out", "layer_out")


@dataclass(frozen=True)
class Architecture:
    """The blocks of one model.

    Attributes:
        family: `model_type` of its configuration.
        layers: dotted name of the list of blocks, e.g. `bert.encoder.layer`, in the model without
            PEFT around it.
        modules: role -> path of its linear inside a block.
        num_layers, hidden_size, intermediate_size, num_heads, num_kv_heads, head_dim: its sizes.
        post_norm, norms_behind: as `Family` has them.
    """

    family: str
    layers: str
    modules: Mapping[str, str]
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    post_norm: bool
    norms_behind: tuple[str, ...] = ()

    @classmethod
    def of(cls, model: nn.Module) -> "Architecture":
        """The architecture of a transformers model, with or without a head, or PEFT around it.

        Raises:
            ModelError: another family than those known.
        """
        model = without_peft(model)
        config = model.config.get_text_config()
        family = FAMILIES.get(config.model_type)
        if family is None:
            why = REFUSED.get(config.model_type)
            raise ModelError(
                f"model: expected one of the families {', '.join(FAMILIES)}, "
                f"got {config.model_type}" + (f": {why}" if why else "")
            )
        base = model.base_model
        prefix = next(name for name, module in model.named_modules() if module is base)
        try:
            base.get_submodule(family.blocks)
        except AttributeError:
            raise ModelError(
                f"model: expected the blocks of a {config.model_type} model at {family.blocks}, "
                f"got {type(model).__name__}, which has them elsewhere"
            ) from None
        num_heads = config.num_attention_heads
        return cls(
            family=config.model_type,
            layers=f"{prefix}.{family.blocks}" if prefix else family.blocks,
            modules=MappingProxyType(dict(family.linears)),
            num_layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            intermediate_size=getattr(config, "intermediate_size", None) or config.hidden_dim,
            num_heads=num_heads,
            num_kv_heads=getattr(config, "num_key_value_heads", None) or num_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // num_heads,
            post_norm=family.post_norm,
            norms_behind=family.norms_behind,
        )

    @property
    def spaces(self) -> tuple[str, ...]:
        """The spaces that a block of this family has."""
        there = {space for role in self.modules for space in ROLES[role]} | {"layer_out"}
        return tuple(space for space in SPACES if space in there)

    def module_name(self, layer: int, role: str) -> str:
        """Dotted name of the linear of `role` in block `layer`; ModelError where there is none."""
        self._check_layer(layer)
        if role not in self.modules:
            raise ModelError(
                f"role: expected one of {', '.join(self.modules)} in a {self.family} block, "
                f"got {role!r}"
            )
        return f"{self.layers}.{layer}.{self.modules[role]}"

    def in_block(self, name: str) -> tuple[int, str] | None:
        """Block and path inside it of a module by its dotted name, which may stand behind PEFT's
        prefixes, e.g. `base_model.model.bert.encoder.layer.3.output.dense`; None outside."""
        match = re.search(rf"(?:^|\.){re.escape(self.layers)}\.(\d+)\.(.+)$", name)
        return None if match is None else (int(match[1]), match[2])

    def is_body(self, name: str) -> bool:
        """Whether a dotted name, without PEFT's prefixes, is of the model below its head.

        A pooler belongs to the head: it is as random as the head where a checkpoint has none, and
        families without one have its layer inside the head.
        """
        body = self.layers.removesuffix(FAMILIES[self.family].blocks)  # "bert.", or "" of a BERT
        return name.startswith(body) and not name.startswith(f"{body}{POOLER}.")

    def layer_module(self, model: nn.Module, layer: int) -> nn.Module:
        """Block `layer` of `model`."""
        self._check_layer(layer)
        return without_peft(model).get_submodule(f"{self.layers}.{layer}")

    def width(self, space: str) -> int:
        """Features of a space; ModelError where this family has no such space."""
        if space not in self.spaces:
            raise ModelError(
                f"space: expected one of {', '.join(self.spaces)} in a {self.family} block, "
                f"got {space!r}"
            )
        if space in RESIDUAL_SPACES:
            return self.hidden_size
        heads = self.heads(space)
        return self.intermediate_size if heads is None else heads * self.head_dim

    def heads(self, space: str) -> int | None:
        """Attention heads that share a space, each with `head_dim` features; None elsewhere."""
        if space in ("query", "context"):
            return self.num_heads
        return self.num_kv_heads if space in ("key", "value") else None

    def _check_layer(self, layer: int) -> None:
        if not 0 <= layer < self.num_layers:
            raise ModelError(
                f"layer: expected 0 to {self.num_layers - 1} in this {self.family} model, "
                f"got {layer}"
            )


def linear_names(*roles: str) -> tuple[tuple[str, ...], ...]:
    """What parents call their linears of these roles: one tuple for each naming among families."""
    return tuple(
        dict.fromkeys(
            tuple(family.linears[role].rpartition(".")[2] for role in roles)
            for family in FAMILIES.values()
            if family.linears.keys() >= set(roles)
        )
    )


def without_peft(model: nn.Module) -> nn.Module:
    """The transformers model inside a PeftModel, or `model` itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def head_modules(model: PreTrainedModel) -> tuple[str, ...]:
    """Modules that a task trains besides the PEFT module: the head, and a pooler it reads from."""
    modules = dict(model.named_children())
    modules.pop(model.base_model_prefix, None)
    pooler = getattr(model.base_model, POOLER, None)
    if pooler is not None:
        modules[POOLER] = pooler
    return tuple(name for name, part in modules.items() if any(True for _ in part.parameters()))


def max_tokens(config: PreTrainedConfig) -> int | None:
    """Tokens that a model has positions for; None where its configuration sets no limit."""
    limit = getattr(config, "max_position_embeddings", None)
    if limit is None:
        return None
    family = FAMILIES.get(config.model_type)
    first = family.first_position if family else 0
    if first != 0:
        return limit - (config.pad_token_id + 1 if first is None else first)
    # `max_position_embeddings` may leave out a scaling such as YaRN's; its parameters are one set,
    # or one for each kind of layer
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    stretched = [
        int((each.get("original_max_position_embeddings") or limit) * (each.get("factor") or 1))
        for each in (rope, *rope.values())
        if isinstance(each, dict)
    ]
    return max(limit, *stretched)

"""Models that are the same function as another one in other coordinates, for known answers.

A clone has the features t @ Q of the original in every space, with a matrix Q of its own for the
residual stream and for the spaces of each block; Q^-1 = Q^T.
"""

from copy import deepcopy

import torch
from peft import get_peft_model
from torch import Tensor, nn

from modxfer_fast.models import Architecture
from modxfer_fast.models.architecture import RESIDUAL_SPACES, ROLES
from modxfer_fast.transfer import PairedBatch, collect_statistics
from tests.transfer_inputs import tiny_model

Bases = dict[tuple[int, str], Tensor]  # (layer, space) -> Q; of the residual stream at every layer


def original(family: str, **options) -> nn.Module:
    """A random model in fp64, so that equality of functions has little rounding to allow for."""
    model = tiny_model(family, vocab_size=60, attn_implementation="eager", **options)
    return model.double().eval()


def permutation(n: int, generator: torch.Generator) -> Tensor:
    """Q [n, n] of a random order: feature j of the clone is feature order[j] of the original."""
    return torch.eye(n, dtype=torch.float64)[:, torch.randperm(n, generator=generator)]


def rotation(n: int, generator: torch.Generator) -> Tensor:
    """Random orthogonal Q [n, n]."""
    q, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    return q.contiguous()


def signed_permutation(n: int, generator: torch.Generator) -> Tensor:
    signs = torch.randint(0, 2, (n,), generator=generator).double() * 2 - 1
    return permutation(n, generator) * signs


def bases(model: nn.Module, make=permutation, inner=permutation, *, seed: int = 0) -> Bases:
    """Matrices under which attention and non-linearities stay what they are.

    Args:
        make: of the residual stream and of value features inside a head.
        inner: of the features of the FFN, behind a non-linearity.
    """
    parts = Architecture.of(model)
    g = torch.Generator().manual_seed(seed)
    residual = make(parts.hidden_size, g)
    group = parts.num_heads // parts.num_kv_heads
    result: Bases = {}
    for layer in range(parts.num_layers):
        result |= {(layer, space): residual for space in RESIDUAL_SPACES}
        kv_heads = permutation(parts.num_kv_heads, g)
        within_group = permutation(group, g)
        heads = torch.kron(kv_heads, within_group)
        # rotary embeddings pair up fixed features, which a permutation inside a head would part
        features = torch.eye(parts.head_dim, dtype=torch.float64)
        if parts.post_norm:
            features = permutation(parts.head_dim, g)
        values = make(parts.head_dim, g)
        result[layer, "query"] = torch.kron(heads, features)
        result[layer, "key"] = torch.kron(kv_heads, features)
        result[layer, "value"] = torch.kron(kv_heads, values)
        result[layer, "context"] = torch.kron(heads, values)
        ffn = inner(parts.intermediate_size, g)
        result |= {(layer, space): ffn for space in ("ffn_gate", "ffn_up", "ffn_inner")}
    return result


def clone(model: nn.Module, q: Bases) -> nn.Module:
    """The same function with features t @ Q; norms must commute with the residual Q."""
    copy = deepcopy(model)
    parts = Architecture.of(model)
    residual = q[0, "layer_out"]
    linears = {}
    for layer in range(parts.num_layers):
        for role in parts.modules:
            reads, writes = ROLES[role]
            linears[parts.module_name(layer, role)] = q[layer, reads], q[layer, writes]
    with torch.no_grad():
        for name, module in copy.named_modules():
            if name in linears:
                reads, writes = linears[name]
                module.weight.copy_(writes.T @ module.weight @ reads)
                if module.bias is not None:
                    module.bias.copy_(module.bias @ writes)
            elif isinstance(module, nn.Embedding | nn.Linear):  # of tokens, or a head
                module.weight.copy_(module.weight @ residual)
            elif getattr(module, "weight", None) is not None:
                # a gain moves with its feature and has no sign; equal gains stay under rotations
                module.weight.copy_(module.weight @ residual.square())
                if getattr(module, "bias", None) is not None:
                    module.bias.copy_(module.bias @ residual)
    return copy


def with_plain_norms(model: nn.Module) -> nn.Module:
    """Gains of all norms set to 1: what is left of an RMS norm commutes with rotations."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name.lower():
                parameter.fill_(1.0)
    return model


def batches(count: int = 5, *, seed: int = 3) -> list[PairedBatch]:
    """Random ids of [8, 12] that both models read; the fifth batch is held out."""
    g = torch.Generator().manual_seed(seed)
    return [PairedBatch.of_ids(torch.randint(3, 60, (8, 12), generator=g)) for _ in range(count)]


def statistics(teacher, student, spaces, layer_map, *, count=5, more=(), **options):
    """Of the pairs of a layer map and `more` of them, on random ids."""
    return collect_statistics(
        teacher,
        student,
        batches(count),
        layer_pairs=(*layer_map.pairs, *more),
        spaces=spaces,
        **options,
    )


def trained(model: nn.Module, config, *, seed: int = 5, std: float = 0.2) -> nn.Module:
    """`model` (copied) with an adapter and head that look trained: no tensor is zero."""
    wrapped = get_peft_model(deepcopy(model), config).eval()
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad and not name.endswith("compacter_rule.default"):
                step = torch.randn(parameter.shape, generator=g, dtype=torch.float64) * std
                parameter.copy_(1 + step if "ia3_l" in name else step)
    return wrapped


def logits(model: nn.Module, *, seed: int = 11) -> Tensor:
    """Of random ids that statistics have not seen."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        return model(input_ids=torch.randint(3, 60, (3, 9), generator=g)).logits

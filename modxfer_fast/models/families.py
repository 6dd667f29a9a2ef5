"""The table of model families: what each calls its blocks, linears and other parts.

A family is one record of FAMILIES, and everything that asks for names reads them there: the places
of linears and features (`architecture.py`), where bottlenecks go (`bottleneck/sites.py`), which
LoRA layers share an input (`fused_lora/group.py`), and the projections that attention relations
compare (the engine's taps).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

SEQUENTIAL, PARALLEL, RESIDUAL, NORM = "sequential", "parallel", "residual", "norm"
# what every family calls the layer between its last block and a head for sequences
POOLER = "pooler"
# what models call the linear that makes logits of the vocabulary, or the modules around it
OUTPUT_EMBEDDINGS = (
    "lm_head",
    "embed_out",
    "cls",
    "predictions",
    "vocab_transform",
    "vocab_layer_norm",
    "vocab_projector",
    "generator_lm_head",
)


class BottleneckSite(NamedTuple):
    """A module to wrap, and what the bottleneck there has to do with it.

    Attributes:
        path: of the module inside a block.
        wiring: for a bottleneck a around a module m,
            sequential: m(x) + a(m(x)); parallel: m(x) + a(x);
            residual: m(x, res + a(res)), where m adds its second argument to its output;
            norm: m(x + a(m(x))), where x is the sum of sublayer output and residual.
        reads, writes: the spaces of `modxfer_fast.models.architecture`.
    """

    path: str
    wiring: str
    reads: str
    writes: str


@dataclass(frozen=True)
class Family:
    """Names in the models of one `model_type`.

    Attributes:
        blocks: path of the list of blocks inside the base model.
        linears: role -> path of its linear inside a block.
        post_norm: whether a norm follows the addition of the residual, as in BERT, and so stands
            between one block's sublayers and what the next one reads.
        norms_behind: spaces that a linear writes and a norm of its own follows, before attention or
            the residual: how large an update is there matters less than its direction.
        bottlenecks: placement -> the sites of a block in the order in which they run; empty where
            none are known.
        first_position: row of the position table that the first token reads; None: the row behind
            that of the padding token.
    """

    blocks: str
    linears: Mapping[str, str]
    post_norm: bool
    norms_behind: tuple[str, ...] = ()
    bottlenecks: Mapping[str, tuple[BottleneckSite, ...]] = field(default_factory=dict)
    first_position: int | None = 0


_BERT = Family(
    blocks="encoder.layer",
    linears={
        "query": "attention.self.query",
        "key": "attention.self.key",
        "value": "attention.self.value",
        "attention_output": "attention.output.dense",
        "ffn_up": "intermediate.dense",
        "ffn_down": "output.dense",
    },
    post_norm=True,
)
_BERT_SITES = {
    "pfeiffer": (BottleneckSite("output.LayerNorm", NORM, "layer_out", "ffn_out"),),
    "houlsby": (
        BottleneckSite("attention.output.dropout", SEQUENTIAL, "attention_out", "attention_out"),
        BottleneckSite("output.dropout", SEQUENTIAL, "ffn_out", "ffn_out"),
    ),
    "parallel": (BottleneckSite("output", RESIDUAL, "ffn_in", "ffn_out"),),
}
_ROBERTA = replace(_BERT, first_position=None)
_DISTILBERT = Family(
    blocks="transformer.layer",
    linears={
        "query": "attention.q_lin",
        "key": "attention.k_lin",
        "value": "attention.v_lin",
        "attention_output": "attention.out_lin",
        "ffn_up": "ffn.lin1",
        "ffn_down": "ffn.lin2",
    },
    post_norm=True,
)
_DISTILBERT_SITES = {
    "pfeiffer": (BottleneckSite("output_layer_norm", NORM, "layer_out", "ffn_out"),),
    "houlsby": (
        BottleneckSite("attention.out_lin", SEQUENTIAL, "attention_out", "attention_out"),
        BottleneckSite("ffn.dropout", SEQUENTIAL, "ffn_out", "ffn_out"),
    ),
    "parallel": (BottleneckSite("ffn", PARALLEL, "ffn_in", "ffn_out"),),
}
_MPNET = replace(
    _BERT,
    linears={
        **_BERT.linears,
        "query": "attention.attn.q",
        "key": "attention.attn.k",
        "value": "attention.attn.v",
        "attention_output": "attention.attn.o",
    },
    first_position=2,  # its padding is 1 in any case
)
_LLAMA = Family(
    blocks="layers",
    linears={
        "query": "self_attn.q_proj",
        "key": "self_attn.k_proj",
        "value": "self_attn.v_proj",
        "attention_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    },
    post_norm=False,
)
_LLAMA_SITES = {
    "pfeiffer": (BottleneckSite("mlp.down_proj", SEQUENTIAL, "ffn_out", "ffn_out"),),
    "houlsby": (
        BottleneckSite("self_attn.o_proj", SEQUENTIAL, "attention_out", "attention_out"),
        BottleneckSite("mlp.down_proj", SEQUENTIAL, "ffn_out", "ffn_out"),
    ),
    "parallel": (BottleneckSite("mlp", PARALLEL, "ffn_in", "ffn_out"),),
}
_HEAD_NORMS, _OUTPUT_NORMS = ("query", "key"), ("attention_out", "ffn_out")
_WITH_SITES = replace(_LLAMA, bottlenecks=_LLAMA_SITES)
FAMILIES: Mapping[str, Family] = {
    "bert": replace(_BERT, bottlenecks=_BERT_SITES),
    "roberta": replace(_ROBERTA, bottlenecks=_BERT_SITES),
    "xlm-roberta": replace(_ROBERTA, bottlenecks=_BERT_SITES),
    "camembert": _ROBERTA,
    "electra": _BERT,
    "mpnet": _MPNET,
    "distilbert": replace(_DISTILBERT, bottlenecks=_DISTILBERT_SITES),
    "llama": _WITH_SITES,
    "mistral": _WITH_SITES,
    "smollm3": _LLAMA,
    "granite": _LLAMA,
    "eurobert": _LLAMA,
    "qwen2": _WITH_SITES,
    "qwen3": replace(_WITH_SITES, norms_behind=_HEAD_NORMS),
    # its experts are no linears, each of which would read and write the same spaces for every token
    "qwen3_moe": replace(
        _LLAMA,
        linears={role: path for role, path in _LLAMA.linears.items() if "ffn" not in role},
        norms_behind=_HEAD_NORMS,
    ),
    "gemma": _WITH_SITES,
    "gemma2": replace(_LLAMA, norms_behind=_OUTPUT_NORMS),
    "gemma3_text": replace(_LLAMA, norms_behind=_HEAD_NORMS + _OUTPUT_NORMS),
    "olmo2": replace(_LLAMA, norms_behind=_HEAD_NORMS + _OUTPUT_NORMS),
}
_FUSED = "one linear writes several spaces, and a module's part in each is not told apart"
# model_type -> why it cannot have a record
REFUSED: Mapping[str, str] = {
    "gpt2": f"{_FUSED}; its weights are transposed",
    "phi3": _FUSED,
    "modernbert": _FUSED,
    "deberta": _FUSED,
    "deberta-v2": "its queries and keys read relative positions as well as features",
    "albert": "its blocks share one set of weights, so that none has a module of its own",
}

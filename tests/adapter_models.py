"""Small models of each family for the tests of adapters, and their blocks written out plainly."""

from collections.abc import Callable

import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForTokenClassification,
    DistilBertConfig,
    DistilBertForTokenClassification,
    LlamaConfig,
    LlamaForTokenClassification,
    RobertaConfig,
    RobertaForTokenClassification,
)

HIDDEN, VOCAB_SIZE, NUM_LABELS = 32, 61, 5
_SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
}
_DISTILBERT = {
    "vocab_size": VOCAB_SIZE,
    "dim": HIDDEN,
    "hidden_dim": 48,
    "n_layers": 2,
    "n_heads": 4,
    "initializer_range": 0.2,
}
_FAMILIES = {
    "bert": (BertForTokenClassification, lambda: BertConfig(**_SIZES)),
    "roberta": (RobertaForTokenClassification, lambda: RobertaConfig(**_SIZES, pad_token_id=0)),
    "distilbert": (DistilBertForTokenClassification, lambda: DistilBertConfig(**_DISTILBERT)),
    "llama": (LlamaForTokenClassification, lambda: LlamaConfig(**_SIZES, num_key_value_heads=2)),
}
FAMILIES = tuple(_FAMILIES)
Adapter = Callable[[Tensor], Tensor]


def base_model(family: str, **options) -> nn.Module:
    """Two layers in evaluation mode, the same weights every time.

    Args:
        options: other values of the configuration.
    """
    model_class, config = _FAMILIES[family]
    config = config()
    config.num_labels = NUM_LABELS
    for name, value in options.items():
        setattr(config, name, value)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return model_class(config).eval()


def adapted(model: nn.Module, config, *, seed: int = 1, random: bool = True) -> nn.Module:
    """`model` as a PeftModel; adapters and head N(0, 0.3), so that nothing is zero by its start."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        peft_model = get_peft_model(model, config).eval()
        if random:
            randomise(peft_model)
    return peft_model


def randomise(peft_model: nn.Module) -> None:
    """Fills everything trainable."""
    with torch.no_grad():
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)


def token_ids(rows: int = 2, length: int = 7, seed: int = 3) -> Tensor:
    """[rows, length], no padding."""
    return torch.randint(1, VOCAB_SIZE, (rows, length), generator=torch.manual_seed(seed))


def plain_hidden_states(
    base: nn.Module, input_ids: Tensor, placement: str, adapters: list[dict[str, Adapter]]
) -> Tensor:
    """Output of the last block, every block written out.

    Args:
        adapters: for each block, `ffn` and with houlsby placement `attention`: a function of [*, d]
            with the scaling in it.
    """
    family = base.config.model_type
    if family == "llama":
        return _llama(base.model, input_ids, placement, adapters)
    encoder = base.base_model
    hidden = encoder.embeddings(input_ids)
    blocks = encoder.transformer.layer if family == "distilbert" else encoder.encoder.layer
    for block, here in zip(blocks, adapters, strict=True):
        if family == "distilbert":
            parts = (block.attention, None, block.sa_layer_norm, block.output_layer_norm)
            ffn = block.ffn
        else:
            output = block.output
            parts = (
                block.attention.self,
                block.attention.output.dense,
                block.attention.output.LayerNorm,
                output.LayerNorm,
            )

            def ffn(x, block=block):
                return block.output.dense(block.intermediate(x))

        hidden = _post_norm_block(hidden, *parts, ffn, placement, here)
    return hidden


def _post_norm_block(hidden, attention, dense, norm_a, norm_f, ffn, placement, here):
    h = attention(hidden, attention_mask=None)[0]
    h = h if dense is None else dense(h)
    if placement == "houlsby":
        h = h + here["attention"](h)
    res = norm_a(h + hidden)
    h = ffn(res)
    if placement == "houlsby":
        h = h + here["ffn"](h)
    elif placement == "parallel":
        h = h + here["ffn"](res)
    else:
        h = h + here["ffn"](norm_f(h + res))
    return norm_f(h + res)


def _llama(model, input_ids, placement, adapters):
    hidden = model.embed_tokens(input_ids)
    positions = torch.arange(input_ids.shape[1])[None]
    rotary = model.rotary_emb(hidden, positions)
    for block, here in zip(model.layers, adapters, strict=True):
        h = block.self_attn(
            block.input_layernorm(hidden), position_embeddings=rotary, attention_mask=None
        )[0]
        if placement == "houlsby":
            h = h + here["attention"](h)
        hidden = hidden + h
        ffn_in = block.post_attention_layernorm(hidden)
        h = block.mlp(ffn_in)
        h = h + here["ffn"](ffn_in if placement == "parallel" else h)
        hidden = hidden + h
    return model.norm(hidden)


def last_hidden_state(model: nn.Module, input_ids: Tensor) -> Tensor:
    """Of the encoder or decoder below the head of a model or PeftModel."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    return model.base_model(input_ids).last_hidden_state

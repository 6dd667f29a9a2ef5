"""Small encoders and their tokenizers for tests; nothing is fetched."""

from pathlib import Path

import torch
from transformers import (
    BertConfig,
    BertTokenizerFast,
    DistilBertConfig,
    PreTrainedConfig,
    PreTrainedModel,
    RobertaConfig,
    XLMRobertaConfig,
)

_CONFIGS = {
    "bert": BertConfig,
    "roberta": RobertaConfig,
    "xlm-roberta": XLMRobertaConfig,
    "distilbert": DistilBertConfig,
}
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def tiny_encoder_config(
    family: str = "bert", hidden_size: int = 32, num_layers: int = 2, vocab_size: int = 97, **fields
) -> PreTrainedConfig:
    """A configuration without dropout, with weights large enough to tell tokens apart."""
    if family == "distilbert":
        sizes = {
            "dim": hidden_size,
            "hidden_dim": 2 * hidden_size,
            "n_layers": num_layers,
            "n_heads": 4,
            "dropout": 0.0,
            "attention_dropout": 0.0,
        }
    else:
        sizes = {
            "hidden_size": hidden_size,
            "intermediate_size": 2 * hidden_size,
            "num_hidden_layers": num_layers,
            "num_attention_heads": 4,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        }
    if "roberta" in family:
        sizes |= {"pad_token_id": 1, "type_vocab_size": 1}
    sizes |= {"max_position_embeddings": 66, "initializer_range": 0.2}
    return _CONFIGS[family](vocab_size=vocab_size, **{**sizes, **fields})


def tiny_encoder(
    auto_class: type, family: str = "bert", *args, seed: int = 0, **fields
) -> PreTrainedModel:
    """A model of `auto_class`, e.g. AutoModel, with the configuration above."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return auto_class.from_config(tiny_encoder_config(family, *args, **fields))


def word_tokenizer(folder: Path, pieces: list[str]) -> BertTokenizerFast:
    """A WordPiece tokenizer of the given pieces and the letters a to z."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    vocab = dict.fromkeys([*_SPECIAL, *pieces, *letters, *(f"##{c}" for c in letters)])
    file = folder / "vocab.txt"
    file.write_text("\n".join(vocab) + "\n", encoding="utf-8")
    return BertTokenizerFast(str(file))

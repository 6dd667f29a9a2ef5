"""Models from `config` blocks."""

import pytest
import torch

from modxfer_fast.config import ConfigError, ModelSection
from modxfer_fast.data import train_tokenizer
from modxfer_fast.models import ModelError, build_model, make_config

LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["a few words to learn from"], 300)


def build(tokenizer, seed=0, **fields):
    block = {**LLAMA, **fields}
    return build_model(
        make_config(block, tokenizer, "student.config"), ModelSection(config=block), seed=seed
    )


def test_vocabulary_and_special_tokens_come_from_the_tokenizer(tokenizer):
    config = make_config(LLAMA, tokenizer, "teacher.config")
    assert config.vocab_size == len(tokenizer)
    assert (config.eos_token_id, config.pad_token_id) == (
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    )
    assert make_config(LLAMA, tokenizer, "x", vocab_size=512).vocab_size == 512
    assert make_config({**LLAMA, "vocab_size": 600}, tokenizer, "x").vocab_size == 600


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"model_type": "lama"}, ModelError, r"c.model_type: .*'lama'; did you mean 'llama'\?"),
        ({"hidden_siz": 3}, ConfigError, r"c.hidden_siz: unknown key; did you mean 'hidden_size'"),
        ({"hidden_size": "x"}, ModelError, r"(?s)c: .*hidden_size"),
        ({"num_attention_heads": 3}, ModelError, r"(?s)c: .*attention heads \(3\)"),
        ({"vocab_size": 10}, ModelError, r"c.vocab_size: expected at least .* \d+, got 10"),
    ],
)  # fmt: skip
def test_wrong_blocks(tokenizer, fields, error, message):
    with pytest.raises(error, match=message):
        make_config({**LLAMA, **fields}, tokenizer, "c")


def test_weights_depend_on_the_seed_alone(tokenizer):
    first = build(tokenizer, seed=3).state_dict()
    torch.manual_seed(99)
    second, other = build(tokenizer, seed=3).state_dict(), build(tokenizer, seed=4).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])

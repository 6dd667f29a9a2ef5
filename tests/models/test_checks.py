"""Teacher, student, tokenizer and packing must fit together."""

import pytest
from transformers import BloomConfig, BloomForCausalLM, GPT2Config, LlamaConfig, LlamaForCausalLM

from modxfer_fast.data import train_tokenizer
from modxfer_fast.models import (
    ModelError,
    check_config_fits,
    check_finite,
    check_packing,
    check_rows_fit,
    check_same_tokenizer,
)

TEXT = "some words and other words to learn from"


def llama(vocab_size=300, attention="sdpa"):
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            attn_implementation=attention,
        )
    )


def test_equal_tokenizers_pass():
    check_same_tokenizer(train_tokenizer([TEXT], 300), train_tokenizer([TEXT], 300), "teacher")


def test_a_differing_tokenizer_is_described():
    ours, theirs = train_tokenizer([TEXT], 300), train_tokenizer(["zebra zebra zebra"], 300)
    with pytest.raises(ModelError) as caught:
        check_same_tokenizer(ours, theirs, "teacher")
    message = str(caught.value)
    assert message.startswith("teacher: its tokenizer differs")
    assert f"{len(ours)} tokens" in message
    assert "absent" in message


def test_vocabularies_must_cover_the_tokenizer():
    tokenizer = train_tokenizer([TEXT], 300)
    check_rows_fit(llama(320), tokenizer, 64, "student")
    for check, model in ((check_rows_fit, llama(64)), (check_config_fits, llama(64).config)):
        with pytest.raises(
            ModelError, match=rf"student: .* at least {len(tokenizer)} rows, one per token, got 64"
        ):
            check(model, tokenizer, 64, "student")


def gpt2(n_positions):
    return GPT2Config(vocab_size=300, n_embd=16, n_layer=1, n_head=2, n_positions=n_positions)


@pytest.mark.parametrize(
    "config",
    [gpt2(128), LlamaConfig(vocab_size=300, max_position_embeddings=128)],
    ids=["gpt2", "llama"],
)
def test_rows_longer_than_the_positions_are_refused(config):
    tokenizer = train_tokenizer([TEXT], 300)
    check_config_fits(config, tokenizer, 128, "teacher")
    with pytest.raises(
        ModelError, match=r"teacher: expected data\.max_length of at most 128, .* got 1024"
    ):
        check_config_fits(config, tokenizer, 1024, "teacher")


def test_scaled_rotary_positions_reach_further():
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    config = LlamaConfig(
        vocab_size=300, max_position_embeddings=64, rope_parameters={"rope_theta": 1e4, **rope}
    )
    check_config_fits(config, train_tokenizer([TEXT], 300), 256, "teacher")
    with pytest.raises(ModelError, match="at most 256"):
        check_config_fits(config, train_tokenizer([TEXT], 300), 257, "teacher")


def test_a_model_without_a_limit_of_positions():
    config = BloomConfig(vocab_size=300, hidden_size=16, n_layer=1, n_head=2)
    check_config_fits(config, train_tokenizer([TEXT], 300), 4096, "student")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_llama_keeps_packed_documents_apart(attention):
    model = llama(attention=attention).train()
    check_packing(model, "student")
    assert model.training


def test_bloom_does_not():
    model = BloomForCausalLM(BloomConfig(vocab_size=300, hidden_size=16, n_layer=1, n_head=2))
    with pytest.raises(ModelError, match=r"student: a bloom model .* set data\.packing: false"):
        check_packing(model, "student")


def test_broken_weights_are_named_with_and_without_packing():
    model = llama()
    check_finite(model, "teacher")
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    for check in (check_finite, check_packing):
        with pytest.raises(ModelError, match=r"teacher: .* in model\.layers\.1\.mlp\.up_proj\.w"):
            check(model, "teacher")


def test_logits_that_overflow_are_told():
    model = llama()
    model.model.norm.register_forward_hook(lambda module, args, output: output * float("inf"))
    with pytest.raises(ModelError, match="student: expected logits that are finite"):
        check_packing(model, "student")

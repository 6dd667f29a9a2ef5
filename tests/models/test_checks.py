"""Teacher, student, tokenizer and packing must fit together."""

import pytest
from transformers import BloomConfig, BloomForCausalLM, LlamaConfig, LlamaForCausalLM

from modxfer_fast.data import train_tokenizer
from modxfer_fast.models import (
    ModelError,
    check_finite,
    check_packing,
    check_same_tokenizer,
    check_same_vocabulary,
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


def test_heads_must_match_and_cover_the_tokenizer():
    tokenizer = train_tokenizer([TEXT], 300)
    check_same_vocabulary(llama(), llama(), tokenizer)
    with pytest.raises(ModelError, match=r"as many rows as the teacher's, 320, got 300"):
        check_same_vocabulary(llama(320), llama(300), tokenizer)
    with pytest.raises(ModelError, match=rf"at least {len(tokenizer)} rows, one per token, got 64"):
        check_same_vocabulary(llama(64), llama(64), tokenizer)


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

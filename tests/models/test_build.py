"""Models from blocks and folders, and adapters on them."""

import pytest
import torch

from modxfer_fast.config import ConfigError, ModelSection, StudentSection
from modxfer_fast.data import train_tokenizer
from modxfer_fast.models import (
    ModelError,
    apply_peft,
    build_model,
    check_peft,
    load_adapter,
    load_model,
    make_config,
)

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


def test_saved_and_loaded_alike(tokenizer, tmp_path):
    model = build(tokenizer)
    model.save_pretrained(tmp_path)
    section = ModelSection(path=str(tmp_path))
    loaded = load_model(str(tmp_path), section).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in model.state_dict().items())
    half = ModelSection(path=str(tmp_path), dtype="bfloat16", attn_implementation="eager")
    loaded = load_model(str(tmp_path), half)
    assert loaded.dtype == torch.bfloat16
    assert loaded.config._attn_implementation == "eager"


def test_missing_and_broken_folders(tmp_path):
    with pytest.raises(ModelError, match="no such folder"):
        load_model("./absent", ModelSection(path="./absent"))
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(str(tmp_path), ModelSection(path=str(tmp_path)))


def test_adapters_freeze_the_rest_and_reload(tokenizer, tmp_path):
    block = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    section = StudentSection(config=LLAMA, peft=block)
    student = apply_peft(build(tokenizer), section.peft, "student.peft", seed=1)
    trainable = {name for name, p in student.named_parameters() if p.requires_grad}
    assert len(trainable) == 4
    assert all("lora_" in name for name in trainable)
    again = apply_peft(build(tokenizer), section.peft, "student.peft", seed=1)
    ids = torch.arange(8)[None]
    torch.testing.assert_close(student(ids).logits, again(ids).logits, rtol=0, atol=0)

    student.save_pretrained(tmp_path)
    loaded = load_adapter(build(tokenizer), tmp_path)
    torch.testing.assert_close(student(ids).logits, loaded(ids).logits, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"rank": 4}, r"student.peft.rank: unknown key"),
        ({"r": "four"}, r"student.peft.r: expected int, got 'four'"),
        ({"task_type": "CAUSAL_LM"}, r"student.peft.task_type: set by the job"),
    ],
)
def test_wrong_adapter_fields(block, message):
    with pytest.raises(ConfigError, match=message):
        check_peft(block, "student.peft")


def test_absent_target_modules(tokenizer):
    with pytest.raises(ModelError, match=r"student.peft: .*absent_proj"):
        apply_peft(build(tokenizer), {"target_modules": ["absent_proj"]}, "student.peft", seed=0)

"""The head and the final norm of a teacher, read without the rest of its weights."""

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel

from modxfer_fast.config import ModelSection
from modxfer_fast.errors import ModelError
from modxfer_fast.jobs.cache.head import final_norm, load_head
from tests.support.models import VOCAB_SIZE, tiny_llama


def tied_llama():
    return tiny_llama(tied=True)


def gemma():
    config = Gemma2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        final_logit_softcapping=2.0,
        initializer_range=0.3,
    )
    return Gemma2ForCausalLM(config)


def gpt2():
    config = GPT2Config(vocab_size=VOCAB_SIZE, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    return GPT2LMHeadModel(config)


@pytest.mark.parametrize("make", [tiny_llama, tied_llama, gemma, gpt2])
@pytest.mark.parametrize("shards", ["10KB", "1GB"])
def test_states_before_the_norm_become_the_logits_of_the_model(tmp_path, make, shards):
    model = make().eval().requires_grad_(False)
    model.save_pretrained(tmp_path, max_shard_size=shards)
    before = []
    norm = final_norm(model.get_decoder())
    norm.register_forward_pre_hook(lambda _, given: before.append(given[0][0]))
    expected = model(input_ids=torch.arange(9)[None]).logits[0].log_softmax(-1)

    skeleton, head = load_head(str(tmp_path), ModelSection(path=str(tmp_path)))
    torch.testing.assert_close(head.log_probs(head.norm(before[0])), expected)
    values = [each for each in skeleton.parameters() if not each.is_meta]
    assert len(values) <= 4  # weights and biases of head and norm


def test_a_checkpoint_without_a_head_is_refused(tmp_path):
    tiny_llama().model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"expected lm_head.weight in its safetensors files"):
        load_head(str(tmp_path), ModelSection(path=str(tmp_path)))

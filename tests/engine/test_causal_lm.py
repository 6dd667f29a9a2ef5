"""Which models are split into backbone and head, and which are refused with the reason."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, TaskType, get_peft_model
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    FalconH1Config,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GraniteConfig,
    HyperCLOVAXConfig,
    NanoChatConfig,
    OPTConfig,
    PhiConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from modxfer_fast.data import CausalCollator
from modxfer_fast.engine import DistillModule, Objective, Teacher
from modxfer_fast.engine.students.causal_lm import SplitCausalLM
from modxfer_fast.kernels.common import Bend
from tests.support.models import TokenDataset, tiny_llama

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OLD = {"vocab_size": 97, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
KNOWN = {
    "cohere": CohereConfig(**SMALL, logit_scale=0.25),
    "granite": GraniteConfig(**SMALL, logits_scaling=8.0),
    "phi-with-bias": PhiConfig(**SMALL),
    "opt": OPTConfig(
        **OLD,
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        word_embed_proj_dim=32,
        max_position_embeddings=64,
    ),
    "gpt2": GPT2Config(**OLD, n_embd=32, n_layer=1, n_head=4),
    "gemma2": Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=30.0),
    "gemma2-without-cap": Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=None),
    "gemma3": Gemma3TextConfig(**SMALL, head_dim=8, final_logit_softcapping=5.0),
    "hyperclovax": HyperCLOVAXConfig(**SMALL, logits_scaling=8.0),
    "nanochat": NanoChatConfig(**SMALL, final_logit_softcapping=15.0),
}


@pytest.mark.parametrize("config", KNOWN.values(), ids=KNOWN.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_hidden_states_times_head_bent_are_the_logits(config, dtype):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    for name, param in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(param)
    split = SplitCausalLM.of(model, "student")
    ids = torch.randint(3, 97, (2, 7))
    with torch.no_grad():
        logits = split.bend.of(F.linear(split.hidden(ids, None, None), *split.weight_and_bias()))
        expected = model(ids).logits
    band = 4 * torch.finfo(dtype).eps * expected.abs().max()
    assert (logits - expected).abs().max() <= band
    assert split.classes == 97


def test_the_probe_leaves_model_and_random_state_alone():
    model = tiny_llama()
    before = torch.random.get_rng_state()
    SplitCausalLM.of(model, "student")
    assert torch.equal(torch.random.get_rng_state(), before)
    assert "forward" not in model.get_decoder().__dict__


BENDS = {
    "cohere": Bend(scale=0.25),
    "granite": Bend(scale=0.125),
    "gemma2": Bend(cap=30.0),
    "gemma2-without-cap": Bend(),
    "hyperclovax": Bend(scale=8.0),
    "nanochat": Bend(cap=15.0),
}


@pytest.mark.parametrize(("name", "bend"), BENDS.items(), ids=BENDS.keys())
def test_bends_are_those_of_the_configuration(name, bend):
    model = AutoModelForCausalLM.from_config(KNOWN[name])
    assert SplitCausalLM.of(model, "teacher").bend == bend


def test_a_configuration_that_says_what_its_model_does_not_do():
    plain = tiny_llama()
    plain.config.final_logit_softcapping = 30.0
    plain.config.logit_scale = 3.0
    assert SplitCausalLM.of(plain, "student").bend == Bend()


@pytest.mark.parametrize(
    "bend", [lambda z: z * 1.7, lambda z: 50.0 * torch.tanh(z / 50.0)], ids=["scale", "cap"]
)
def test_unknown_functions_of_the_head_are_refused(bend):
    class Odd(type(tiny_llama())):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = bend(output.logits)
            return output

    model = Odd(tiny_llama().config)
    model.config.logit_scale = 2.5
    with pytest.raises(
        ValueError,
        match=r"student: the logits of Odd are not its last hidden states.* \(logit_scale=2.5\)",
    ):
        SplitCausalLM.of(model, "student")


def test_head_multiplier_is_found():
    config = FalconH1Config(
        **SMALL,
        lm_head_multiplier=0.125,
        mamba_d_ssm=32,
        mamba_n_heads=4,
        mamba_d_head=8,
        mamba_n_groups=1,
        mamba_d_state=8,
    )
    split = SplitCausalLM.of(AutoModelForCausalLM.from_config(config), "student")
    assert split.bend == Bend(scale=0.125)


def test_encoder_decoder_is_refused():
    config = T5Config(
        vocab_size=97,
        d_model=16,
        d_ff=32,
        d_kv=8,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
    )
    with pytest.raises(TypeError, match="expected a decoder-only model"):
        SplitCausalLM.of(T5ForConditionalGeneration(config), "teacher")


def test_other_modules_are_refused():
    with pytest.raises(
        TypeError, match="student: expected a PreTrainedModel or PeftModel, got Linear"
    ):
        SplitCausalLM.of(torch.nn.Linear(2, 2), "student")


@pytest.mark.parametrize(
    "config",
    [
        PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=2),
        PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=2),
    ],
    ids=["prompt", "prefix"],
)
def test_prompt_learning_is_refused(config):
    with pytest.raises(ValueError, match="adds virtual tokens in front of the backbone"):
        SplitCausalLM.of(get_peft_model(tiny_llama(), config), "student")


def test_adapter_on_the_head_is_refused():
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj", "lm_head"]))
    with pytest.raises(ValueError, match=r"head without an adapter.*modules_to_save"):
        SplitCausalLM.of(model, "student")


def test_a_head_trained_whole_beside_adapters_is_used():
    model = get_peft_model(
        tiny_llama(), LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    )
    split = SplitCausalLM.of(model, "student")
    weight, _ = split.weight_and_bias()
    assert weight.requires_grad
    with torch.no_grad():
        weight.mul_(3.0)
        ids = torch.randint(3, 97, (1, 5))
        logits = F.linear(split.hidden(ids, None, None), weight)
        torch.testing.assert_close(logits, model(ids).logits)


def test_adapters_act_on_the_hidden_states():
    model = get_peft_model(
        tiny_llama(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    )
    split = SplitCausalLM.of(model.eval(), "student")
    ids = torch.randint(3, 97, (1, 5))
    with torch.no_grad():
        logits = F.linear(split.hidden(ids, None, None), split.weight_and_bias()[0])
        torch.testing.assert_close(logits, model(ids).logits)


def test_positions_that_a_model_cannot_take_are_refused():
    model = AutoModelForCausalLM.from_config(
        BloomConfig(**OLD, hidden_size=32, n_layer=1, n_head=4)
    )
    split = SplitCausalLM.of(model, "student")
    ids = torch.randint(3, 97, (1, 5))
    assert split.hidden(ids, None, None).shape == (1, 5, 32)
    with pytest.raises(ValueError, match="position_ids: BloomModel takes none"):
        split.hidden(ids, None, torch.arange(5)[None])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_no_token_of_a_packed_row_sees_another_document(attention):
    model = tiny_llama().eval()
    model.set_attn_implementation(attention)
    split = SplitCausalLM.of(model, "student")
    documents = [[5, 6, 7], [8, 9, 10, 11], [12, 13]]
    lengths = [len(document) for document in documents]

    def states(*documents):
        ids = [token for document in documents for token in document]
        row = {"input_ids": ids, "is_target": [True] * len(ids), "lengths": lengths}
        batch = CausalCollator(0)([row])
        with torch.no_grad():
            return split.hidden(batch["input_ids"], None, batch["position_ids"])[0].split(lengths)

    before = states(*documents)
    for changed in range(3):
        others = [[id + 20 for id in d] if i == changed else d for i, d in enumerate(documents)]
        for i, (old, new) in enumerate(zip(before, states(*others), strict=True)):
            assert torch.equal(old, new) == (i != changed)


def test_flattened_rows_for_variable_length_kernels_give_the_same_states(monkeypatch):
    model = tiny_llama().eval()
    split = SplitCausalLM.of(model, "student")
    ids = torch.randint(3, 97, (3, 8))
    positions = torch.tensor([0, 1, 2, 0, 1, 2, 3, 4]).expand(3, 8)
    with torch.no_grad():
        expected = split.hidden(ids, None, positions)
        shapes = []
        forward = model.get_decoder().forward

        def as_flash(input_ids, position_ids, use_cache):
            shapes.append(input_ids.shape)
            model.config._attn_implementation = "sdpa"
            return forward(input_ids=input_ids, position_ids=position_ids, use_cache=use_cache)

        monkeypatch.setattr(model.get_decoder(), "forward", as_flash, raising=False)
        model.config._attn_implementation = "flash_attention_2"
        flat = split.hidden(ids, None, positions)
    assert shapes == [(1, 24)]
    torch.testing.assert_close(flat, expected)


def varlen(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """What flash_attn_varlen_func computes: each span of `cu_seq_lens` sees itself alone."""
    starts = kwargs["cu_seq_lens_q"].tolist()
    assert query.shape[0] == 1
    assert attention_mask is None
    assert kwargs["cu_seq_lens_q"].dtype == torch.int32
    assert kwargs["max_length_q"] == max(end - start for start, end in pairwise(starts))
    spans = [
        F.scaled_dot_product_attention(
            *(x[:, :, start:end] for x in (query, key, value)),
            is_causal=True,
            scale=scaling,
            enable_gqa=True,
        )
        for start, end in pairwise(starts)
    ]
    return torch.cat(spans, dim=2).transpose(1, 2), None


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flash_varlen_of_test"])
def test_packed_documents_learn_what_each_would_alone(attention):
    AttentionInterface.register("flash_varlen_of_test", varlen)
    texts = [row.tolist() for row in TokenDataset(7).rows]

    def row(*texts):
        ids = [token for text in texts for token in text]
        lengths = [len(text) for text in texts]
        return {"input_ids": ids, "is_target": [True] * len(ids), "lengths": lengths}

    packed = CausalCollator(0)([row(*texts[:4]), row(*texts[4:])])
    alone = CausalCollator(0, packed=False)([row(text) for text in texts])
    gradients = []
    for batch, used in ((packed, attention), (alone, "eager")):
        student, teacher = tiny_llama(), tiny_llama(48, 2, seed=1)
        for model in (student, teacher):
            model.config._attn_implementation = used
        module = DistillModule(student, Teacher(teacher), Objective(ce_weight=0.3)).train()
        module(**batch)["loss"].backward()
        gradients.append([param.grad for param in student.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)

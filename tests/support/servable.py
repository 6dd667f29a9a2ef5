"""A small model with its tokenizer, as vLLM runs one on a CPU: heads of 32, fixed values."""

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from modxfer_fast.data import train_tokenizer

WORDS = ["import", "return", "def", "class", "while", "for", "yield", "lambda", "pass", "raise"]
TEXTS = [" ".join(WORDS[(i * j) % 10] for j in range(1, 30)) for i in range(120)]
MAX_LENGTH = 128


def servable_tokenizer():
    return train_tokenizer(TEXTS, 320)


def servable_llama(vocab_size: int, seed: int = 0) -> LlamaForCausalLM:
    """Values from torch's generator alone, so that replies recorded once stay true."""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=256,
            tie_word_embeddings=False,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "norm" in name:
                parameter.fill_(1.0)
            else:
                scale = 0.3 if name == "lm_head.weight" else 0.1
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model.eval()


def save_servable(folder, seed: int = 0) -> LlamaForCausalLM:
    """A folder with both."""
    tokenizer = servable_tokenizer()
    model = servable_llama(len(tokenizer), seed)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def servable_lora(base: LlamaForCausalLM, rank: int = 4) -> PeftModel:
    """A student of that base; see `move`."""
    targets = ["q_proj", "v_proj", "down_proj"]
    config = LoraConfig(r=rank, target_modules=targets, lora_alpha=2 * rank, task_type="CAUSAL_LM")
    return move(get_peft_model(base, config))


@torch.no_grad()
def move(student: PeftModel, seed: int = 0) -> PeftModel:
    """The student with other values in its adapter, from torch's generator alone."""
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in sorted(student.named_parameters()):
        if parameter.requires_grad:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return student

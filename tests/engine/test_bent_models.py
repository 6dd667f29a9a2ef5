"""Models that scale or cap their logits: the engine's loss is that of the logits they give."""

import pytest
import torch
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GraniteConfig

from modxfer_fast.engine import Objective, Teacher
from modxfer_fast.engine.module import DistillModule
from tests.support.models import VOCAB_SIZE, TokenDataset, align_collate, tiny_llama
from tests.support.reference import dense_loss, dense_terms

SMALL = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.4,  # logits large enough to reach the caps
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS = {
    "gemma2": Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=3.0),
    "cohere": CohereConfig(**SMALL, logit_scale=0.25),
    "granite": GraniteConfig(**SMALL, logits_scaling=2.0),
}


def model(name: str, seed: int):
    if name == "llama":
        return tiny_llama(seed=seed).double()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.float64)


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ("gemma2", "gemma2"),
        ("gemma2", "llama"),
        ("llama", "gemma2"),
        ("cohere", "granite"),
        ("granite", "gemma2"),
    ],
)
def test_loss_and_gradients_are_those_of_the_models_own_logits(student, teacher):
    student, teacher = model(student, 0), model(teacher, 1)
    batch = align_collate([TokenDataset(3)[i] for i in range(3)])
    objective = Objective("jsd", 0.3, 1.5, 0.7, 0.4, backend="reference")
    module = DistillModule(student, Teacher(teacher), objective).train()
    loss = module(**batch)["loss"]
    kd, ce, count = dense_terms(student, teacher, batch, objective)
    expected = dense_loss(kd, ce, objective) / count
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    names, leaves = zip(*student.named_parameters(), strict=True)
    for name, *grads in zip(
        names, *(torch.autograd.grad(value, leaves) for value in (loss, expected)), strict=True
    ):
        torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-13, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("impl", ["fused", "dense"])
def test_single_precision_and_cross_entropy_alone(impl):
    student = model("gemma2", 0)
    batch = align_collate([TokenDataset(3)[i] for i in range(3)])
    _, ce, count = dense_terms(student, None, batch, Objective())
    module = DistillModule(
        student.float(), None, Objective(kd_weight=0.0, ce_weight=1.0, impl=impl)
    )
    loss = module.train()(**batch)["loss"]
    torch.testing.assert_close(loss.double(), ce.detach() / count, rtol=1e-5, atol=0)

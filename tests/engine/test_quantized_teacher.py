"""A teacher with blocks of fewer bits answers nearly as the whole one, of far fewer bytes."""

import copy
import sys
from functools import partial

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config

from modxfer_fast.engine import DistillConfig, DistillModule, DistillTrainer, Objective, Teacher
from modxfer_fast.engine.batch import Batch
from modxfer_fast.engine.teachers.quantized import (
    QuantizedTeacher,
    stored_bytes,
    stored_bytes_of,
)
from modxfer_fast.errors import ModelError
from tests.support.models import TokenDataset, align_collate, tiny_llama
from tests.support.quantized import LIBRARIES, restored_weight

DATA = TokenDataset(8)
BATCH = align_collate([DATA[i] for i in range(4)])
INPUTS = Batch({name: BATCH[name] for name in ("input_ids", "attention_mask")})
# nats of KL(whole || quantised) per token, of rows with an entropy of 4.2
BOUNDS = {"int8": 5e-4, "nf4": 0.1}
SHARES = {"int8": 0.3, "nf4": 0.2}  # of fp32


@pytest.fixture(params=list(BOUNDS))
def quantization(request):
    pytest.importorskip(LIBRARIES[request.param])
    return request.param


def model(**config):
    return tiny_llama(64, 3, seed=1, **config)


def logits(answer):
    return answer.output @ answer.head[0].T


def log_probs(teacher):
    return logits(teacher.answer(INPUTS)).log_softmax(-1)


def test_logits_are_near_and_blocks_small(quantization):
    whole = model()
    blocks = stored_bytes(whole.model.layers)
    planned = sum(
        stored_bytes_of(param, quantization) if param.ndim == 2 else param.nbytes
        for param in whole.model.layers.parameters()
    )
    expected = log_probs(Teacher(copy.deepcopy(whole)))
    teacher = QuantizedTeacher(whole, quantization=quantization)
    got = log_probs(teacher)
    divergence = (expected.exp() * (expected - got)).sum(-1)
    assert 0 < divergence.max() < BOUNDS[quantization]
    assert stored_bytes(whole.model.layers) == planned < SHARES[quantization] * blocks
    assert torch.equal(whole.lm_head.weight, model().lm_head.weight)
    assert whole.lm_head.weight.dtype == torch.float32


def test_each_weight_is_within_half_a_step(quantization):
    whole, plain = model(), model()
    QuantizedTeacher(whole, quantization=quantization)
    names = [name for name, m in plain.model.layers.named_modules() if isinstance(m, nn.Linear)]
    assert len(names) == 3 * 7
    for name in names:
        weight = plain.model.layers.get_submodule(name).weight.detach()
        given = restored_weight(whole.model.layers.get_submodule(name))
        if quantization == "int8":  # 255 steps between the largest of a row and its negative
            step = 2 / 254
        else:  # the widest of NF4's, of a block of 64
            step, weight, given = 0.3039, weight.reshape(-1, 64), given.reshape(-1, 64)
        largest = weight.abs().amax(1, keepdim=True)
        assert ((weight - given).abs() <= (step / 2 + 2e-3) * largest).all(), name


def test_its_dropout_is_off_and_broken_numbers_are_named(quantization):
    teacher = QuantizedTeacher(model(attention_dropout=0.5), quantization=quantization)
    teacher.model.train()
    assert torch.equal(logits(teacher.answer(INPUTS)), logits(teacher.answer(INPUTS)))
    assert not any(param.requires_grad for param in teacher.model.parameters())
    assert teacher.nonfinite_parameters() == []
    broken = model()
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    names = QuantizedTeacher(broken, quantization=quantization).nonfinite_parameters()
    assert names == ["model.layers.1.mlp.up_proj.weight"]


def test_a_student_learns_from_it(quantization, tmp_path):
    args = DistillConfig(
        output_dir=str(tmp_path),
        max_steps=3,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
    )
    teacher = QuantizedTeacher(model(), quantization=quantization)
    answer = teacher.answer(INPUTS)

    class Same:
        """Answers as the quantised one does."""

        kind, num_tokens, classes = "causal_lm", None, teacher.classes

        def to(self, device):
            return self

        def nonfinite_parameters(self):
            return []

        def taps(self):
            return None

        def answer(self, batch, taps=None):
            return answer

    losses = [
        DistillModule(tiny_llama(), each, Objective()).train()(**BATCH)["loss"]
        for each in (teacher, Same())
    ]
    assert torch.equal(*losses)
    run = DistillTrainer(tiny_llama(), args, teacher, DATA, DATA, data_collator=align_collate)
    before = run.evaluate()["eval_kd"]
    run.train()
    assert run.evaluate()["eval_kd"] < before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_mixed_precision_it_is_as_near_as_rounding(quantization, dtype):
    whole = model().to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        expected, got = (
            log_probs(make(copy.deepcopy(whole))).float()
            for make in (Teacher, partial(QuantizedTeacher, quantization=quantization))
        )
    divergence = (expected.exp() * (expected - got)).sum(-1)
    assert divergence.max() < BOUNDS[quantization] + 0.02  # logits of 8 bits


def test_blocks_without_linears_are_refused(quantization):
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=64, bos_token_id=0)
    gpt2 = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ModelError, match=r"nn\.Linear.* got none in GPT2LMHeadModel"):
        QuantizedTeacher(gpt2, quantization=quantization)


def test_what_is_absent_or_unknown_is_told(monkeypatch):
    with pytest.raises(ValueError, match="quantization: expected one of int8, nf4, got 'int3'"):
        QuantizedTeacher(model(), quantization="int3")
    for name, library in LIBRARIES.items():
        monkeypatch.setitem(sys.modules, library, None)
        monkeypatch.setitem(sys.modules, f"{library}.quantization", None)
        with pytest.raises(ImportError, match=f"quantization {name} needs {library}; pip install"):
            QuantizedTeacher(model(), quantization=name)

"""PEFT modules from blocks: on language models alone, on task models with the head."""

import pytest
import torch
from peft import PeftModel
from transformers import DistilBertConfig, DistilBertModel

from modxfer_fast.config import ConfigError
from modxfer_fast.config.model import PretrainedSection
from modxfer_fast.models import (
    BottleneckConfig,
    ModelError,
    apply_peft,
    check_peft,
    check_targets,
    load_adapter,
    load_task_model,
)
from modxfer_fast.models.architecture import head_modules
from tests.task_inputs import LABELS, NER_LABELS, tiny_llama


def test_adapters_freeze_the_rest_and_reload(tmp_path):
    block = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    student = apply_peft(tiny_llama(), block, "student.peft", seed=1)
    trainable = {name for name, p in student.named_parameters() if p.requires_grad}
    assert len(trainable) == 4
    assert all("lora_" in name for name in trainable)
    again = apply_peft(tiny_llama(), block, "student.peft", seed=1)
    ids = torch.arange(8)[None]
    torch.testing.assert_close(student(ids).logits, again(ids).logits, rtol=0, atol=0)

    student.save_pretrained(tmp_path)
    loaded = load_adapter(tiny_llama(), tmp_path)
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


def test_absent_target_modules():
    with pytest.raises(ModelError, match=r"student.peft: .*absent_proj"):
        apply_peft(tiny_llama(), {"target_modules": ["absent_proj"]}, "student.peft", seed=0)


def test_every_type_goes_on_a_language_model(tmp_path):
    model = apply_peft(tiny_llama(), {"type": "bottleneck", "bottleneck_size": 4}, seed=1)
    assert isinstance(model.peft_config["default"], BottleneckConfig)
    assert model.peft_config["default"].task_type == "CAUSAL_LM"
    check_targets(tiny_llama().config, {"type": "ia3"}, "peft")
    block = {"type": "bottleneck", "bottleneck_size": 4, "target_modules": ["q_proj"]}
    with pytest.raises(ModelError, match="target_modules: expected sites of placement pfeiffer"):
        check_targets(tiny_llama().config, block, "peft")


@pytest.mark.parametrize(
    "block",
    [
        {"type": "lora", "r": 4, "target_modules": ["query", "value"]},
        {"type": "ia3", "target_modules": ["key", "value"], "feedforward_modules": []},
        {"type": "bottleneck", "bottleneck_size": 8},
        {"type": "compacter", "bottleneck_size": 8, "phm_dim": 4},
    ],
    ids=lambda block: block["type"],
)
def test_module_and_head_train_and_are_saved(encoder, tmp_path, block):
    model = apply_peft(
        load_task_model(encoder, "nli", LABELS, seed=0), block, "teacher.peft", seed=3, task="nli"
    )
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert any("classifier.modules_to_save" in name for name in trained)
    assert any("pooler.modules_to_save" in name for name in trained)
    assert sum("encoder.layer" in name for name in trained) >= 2
    assert any("query" in name for name in frozen)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(
        load_task_model(encoder, "nli", LABELS, seed=8), tmp_path / "adapter"
    )
    theirs = dict(loaded.named_parameters())
    ours = dict(model.named_parameters())
    assert all(torch.equal(ours[name], theirs[name]) for name in trained)


def test_adapter_weights_depend_on_the_seed(encoder):
    def weights(seed):
        torch.manual_seed(123 + seed)
        model = load_task_model(encoder, "ner", NER_LABELS, seed=0)
        model = apply_peft(model, {"type": "lora", "r": 2}, seed=seed, task="ner")
        return {name: p.detach() for name, p in model.named_parameters() if "lora_A" in name}

    one, again, other = weights(1), weights(1), weights(2)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)


def test_every_part_of_a_head_is_trained(tmp_path):
    config = DistilBertConfig(vocab_size=40, dim=32, hidden_dim=64, n_layers=1, n_heads=4)
    DistilBertModel(config).save_pretrained(tmp_path / "encoder")
    section = PretrainedSection(path=str(tmp_path / "encoder"))
    model = load_task_model(section, "nli", LABELS, seed=0)
    assert head_modules(model) == ("pre_classifier", "classifier")
    model = apply_peft(model, {"target_modules": ["q_lin"]}, seed=0, task="nli")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    for part in ("pre_classifier", "classifier"):
        assert f"base_model.model.{part}.modules_to_save.default.weight" in trained


@pytest.mark.parametrize(
    ("block", "error", "message"),
    [
        (
            {"type": "prefix"},
            ModelError,
            r"teacher\.peft\.type: expected one of lora, ia3, bottleneck, compacter, got 'prefix'",
        ),
        ({"type": "lora", "rank": 4}, ConfigError, r"teacher\.peft\.rank: unknown key"),
        ({"type": "lora", "task_type": "X"}, ConfigError, "set by the job, not here"),
        ({"type": "bottleneck"}, ModelError, "bottleneck_size and reduction_factor"),
        ({"type": "lora", "target_modules": ["absent"]}, ModelError, "absent"),
    ],
)
def test_peft_blocks_that_are_refused(encoder, block, error, message):
    model = load_task_model(encoder, "ner", NER_LABELS, seed=0)
    with pytest.raises(error, match=message):
        apply_peft(model, block, "teacher.peft", seed=0, task="ner")


def test_peft_blocks_are_checked_without_a_model():
    check_peft({"type": "lora", "r": 4, "use_rslora": True}, "peft")
    with pytest.raises(ConfigError, match=r"peft\.r: expected int"):
        check_peft({"type": "lora", "r": "4"}, "peft")

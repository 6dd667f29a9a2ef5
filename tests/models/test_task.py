"""Task models: heads by seed, labels that must agree, PEFT modules that train with the head."""

import pytest
import torch
from peft import PeftModel
from transformers import BertForSequenceClassification, DistilBertConfig, DistilBertModel

from modxfer_fast.config import ConfigError
from modxfer_fast.config.model import PretrainedSection
from modxfer_fast.models import ModelError
from modxfer_fast.models.task import (
    apply_task_peft,
    check_task_peft,
    head_modules,
    load_task_model,
)
from tests.task_inputs import NER_LABELS, tiny_bert, word_tokenizer

LABELS = ("no", "yes", "maybe")


@pytest.fixture
def encoder(tmp_path) -> PretrainedSection:
    tiny_bert(word_tokenizer(tmp_path)).save_pretrained(tmp_path / "encoder")
    return PretrainedSection(path=str(tmp_path / "encoder"))


def test_the_head_depends_on_the_seed_alone(encoder):
    torch.manual_seed(99)
    one = load_task_model(encoder, "ner", NER_LABELS, seed=1)
    torch.manual_seed(7)
    again = load_task_model(encoder, "ner", NER_LABELS, seed=1)
    other = load_task_model(encoder, "ner", NER_LABELS, seed=2)
    assert torch.equal(one.classifier.weight, again.classifier.weight)
    assert not torch.equal(one.classifier.weight, other.classifier.weight)
    body = one.bert.state_dict()
    assert all(torch.equal(body[name], value) for name, value in other.bert.state_dict().items())
    assert one.config.id2label == dict(enumerate(NER_LABELS))


def test_a_saved_head_is_kept_and_its_labels_compared(encoder, tmp_path):
    saved = load_task_model(encoder, "nli", LABELS, seed=1)
    saved.save_pretrained(tmp_path / "tuned")
    tuned = PretrainedSection(path=str(tmp_path / "tuned"))
    loaded = load_task_model(tuned, "nli", LABELS, seed=2)
    assert torch.equal(loaded.classifier.weight, saved.classifier.weight)
    with pytest.raises(ModelError, match=r"of the task, a, b, got one for no, yes, maybe"):
        load_task_model(tuned, "nli", ["a", "b"], seed=0)
    with pytest.raises(ModelError, match=r"maybe, no, yes, got .*task\.labels gives their order"):
        load_task_model(tuned, "nli", sorted(LABELS), seed=0)
    with pytest.raises(ModelError, match="got a BertForSequenceClassification; save its base"):
        load_task_model(tuned, "ner", NER_LABELS, seed=0)


def test_names_that_transformers_made_up_are_no_labels(encoder, tmp_path):
    BertForSequenceClassification.from_pretrained(encoder.path, num_labels=3).save_pretrained(
        tmp_path / "unnamed"
    )
    section = PretrainedSection(path=str(tmp_path / "unnamed"))
    assert load_task_model(section, "nli", LABELS, seed=0).config.id2label[1] == "yes"
    with pytest.raises(ModelError, match="got one for LABEL_0, LABEL_1, LABEL_2"):
        load_task_model(section, "nli", ["a", "b"], seed=0)


def test_what_cannot_be_loaded(encoder, tmp_path):
    with pytest.raises(ModelError, match="no such folder"):
        load_task_model(PretrainedSection(path="./absent"), "ner", NER_LABELS, seed=0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"empty: cannot be loaded"):
        load_task_model(PretrainedSection(path=str(tmp_path / "empty")), "ner", NER_LABELS, seed=0)
    shallow = tiny_bert(word_tokenizer(tmp_path), num_layers=1)
    shallow.config.num_hidden_layers = 2
    shallow.save_pretrained(tmp_path / "shallow")
    section = PretrainedSection(path=str(tmp_path / "shallow"))
    with pytest.raises(ModelError, match=r"16 are absent, e\.g\. bert\.encoder\.layer\.1\."):
        load_task_model(section, "ner", NER_LABELS, seed=0)


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
    model = apply_task_peft(
        load_task_model(encoder, "nli", LABELS, seed=0), block, "nli", seed=3, where="teacher.peft"
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
        model = apply_task_peft(model, {"type": "lora", "r": 2}, "ner", seed=seed)
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
    model = apply_task_peft(model, {"type": "lora", "target_modules": ["q_lin"]}, "nli", seed=0)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    for part in ("pre_classifier", "classifier"):
        assert f"base_model.model.{part}.modules_to_save.default.weight" in trained


@pytest.mark.parametrize(
    ("block", "error", "message"),
    [
        ({"r": 4}, ModelError, r"teacher\.peft\.type: expected one of lora, ia3, .* got None"),
        ({"type": "prefix"}, ModelError, "bottleneck, compacter, got 'prefix'"),
        ({"type": "lora", "rank": 4}, ConfigError, r"teacher\.peft\.rank: unknown key"),
        ({"type": "lora", "task_type": "X"}, ConfigError, "set by the task, not here"),
        ({"type": "bottleneck"}, ModelError, "bottleneck_size and reduction_factor"),
        ({"type": "lora", "target_modules": ["absent"]}, ModelError, "absent"),
    ],
)
def test_peft_blocks_that_are_refused(encoder, block, error, message):
    model = load_task_model(encoder, "ner", NER_LABELS, seed=0)
    with pytest.raises(error, match=message):
        apply_task_peft(model, block, "ner", seed=0, where="teacher.peft")


def test_peft_blocks_are_checked_without_a_model():
    check_task_peft({"type": "lora", "r": 4, "use_rslora": True}, "peft")
    with pytest.raises(ConfigError, match=r"peft\.r: expected int"):
        check_task_peft({"type": "lora", "r": "4"}, "peft")

"""Models from folders: language models as they were saved, task heads by seed and labels."""

import pytest
import torch
from transformers import BertForSequenceClassification

from modxfer_fast.config.model import ModelSection, PretrainedSection
from modxfer_fast.models import ModelError, load_model, load_task_model
from tests.task_inputs import LABELS, NER_LABELS, tiny_bert, tiny_llama, word_tokenizer


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


def test_saved_and_loaded_alike(tmp_path):
    model = tiny_llama()
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

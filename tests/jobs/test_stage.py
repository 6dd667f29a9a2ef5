"""A stage's fingerprint: all that its build function sees, and nothing besides."""

import os
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from modxfer_fast import models
from modxfer_fast.config import ModelSection, TokenizerSection
from modxfer_fast.config.model import PretrainedSection
from modxfer_fast.config.transfer import RefineSection
from modxfer_fast.jobs.distill.models import ModelSource
from modxfer_fast.jobs.stage import Live, OutsideFolder, Stage, facts_of, fingerprint
from modxfer_fast.jobs.task.models import TaskModel
from modxfer_fast.jobs.task.stages import TrainingOptions
from modxfer_fast.jobs.transfer.builds import Texts


@dataclass(frozen=True)
class Options:
    text: str = "a"
    more: Any = None


def nothing(context):
    pass


def something(context):
    pass


BASE = Stage("base", nothing, Options())


@pytest.mark.parametrize(
    "changed",
    [
        replace(BASE, options=Options("b")),
        replace(BASE, options=Options(more={"nested": [1]})),
        replace(BASE, inputs={"of": Stage("other", nothing, Options())}),
        replace(BASE, build=something),
        replace(BASE, versions=("torch",)),
    ],
    ids=["option", "nested", "input", "build", "versions"],
)
def test_everything_that_a_build_sees_changes_the_fingerprint(changed):
    assert changed.fingerprint != BASE.fingerprint


def test_inputs_count_by_all_that_they_depend_on_and_by_their_name():
    def on(name, **inputs):
        return Stage("top", nothing, Options(), {name: Stage("base", nothing, Options(**inputs))})

    fingerprints = {on("a").fingerprint, on("b").fingerprint, on("a", text="b").fingerprint}
    assert len(fingerprints) == 3
    assert on("a").fingerprint == on("a").fingerprint


def test_the_fingerprint_is_the_same_in_every_process():
    """Sets and mappings have no order of their own."""
    one, two = (
        Options(more={"x": 1, "y": {"q", "k", "v"}}),
        Options(more={"y": {"v", "k", "q"}, "x": 1}),
    )
    assert fingerprint(facts_of(one)) == fingerprint(facts_of(two))
    assert facts_of(one) == {"text": "a", "more": {"x": 1, "y": ["k", "q", "v"]}}
    assert fingerprint({"a": 1}) == "f9d86028c6e0d64e2251"


def test_a_number_is_another_key_than_its_digits():
    assert facts_of({1: "a"}) != facts_of({"1": "a"})


def test_a_build_is_told_by_its_module_too():
    def elsewhere(context):
        pass

    elsewhere.__name__ = "nothing"
    assert replace(BASE, build=elsewhere).fingerprint != BASE.fingerprint


def test_a_pair_is_another_text_than_two_words():
    pair, words = Texts([("a", "b")]), Texts([["a", "b"]])
    assert facts_of(pair) != facts_of(words)


def test_the_model_of_a_task_is_told_by_all_that_loads_it(tmp_path):
    (tmp_path / "config.json").write_text("{}")

    def model(kind="ner", **section):
        section = PretrainedSection(path=str(tmp_path), **section)
        return facts_of(TaskModel(section, kind, ("a", "b"), 0, torch.device("cpu")))

    assert model() == model()
    assert model() != model("nli")
    assert model() != model(trust_remote_code=True)


def test_a_model_without_its_seed_is_one_object_whose_weights_are_read_once(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    section = PretrainedSection(path=str(tmp_path))
    model = TaskModel(section, "ner", ("a", "b"), 3, torch.device("cpu"))
    assert model.without_seed is model.without_seed
    assert model.without_seed.without_seed is model.without_seed


def test_sections_are_their_fields():
    assert facts_of(TokenizerSection(vocab_size=320)) == {"vocab_size": 320, "path": None}


def test_a_secret_is_no_fact():
    training = {"max_steps": 3, "hub_token": "hf_secret"}
    assert facts_of(Options(more=training)) == {"text": "a", "more": {"max_steps": 3}}


@pytest.mark.parametrize("key", ["deepspeed", "fsdp_config", "accelerator_config"])
def test_a_json_file_of_training_is_told_by_what_is_in_it(key, tmp_path):
    def facts(given):
        refine = RefineSection(training={"max_steps": 3, key: given})
        return facts_of(Options(more={"of": refine, "training": {key: given}}))

    files = [tmp_path / name for name in ("one.json", "other.json")]
    for file in files:
        file.write_text('{"zero_optimization": {"stage": 2}}')
    one, other = (facts(str(file)) for file in files)
    assert one == other == facts({"zero_optimization": {"stage": 2}})
    assert one == facts('{"zero_optimization": {"stage": 2}}')
    files[0].write_text('{"zero_optimization": {"stage": 3}}')
    assert facts(str(files[0])) != other


def test_a_training_of_a_task_is_told_by_what_is_in_its_deepspeed_file(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    model = TaskModel(PretrainedSection(path=str(tmp_path)), "ner", ("a",), 0, torch.device("cpu"))
    file = tmp_path / "zero.json"

    def stage(content):
        file.write_text(content)
        options = TrainingOptions(model, Live(None, "examples"), {"deepspeed": str(file)})
        return Stage("teacher", nothing, options)

    assert stage('{"a": 1}').fingerprint == stage('{"a":1}').fingerprint
    assert stage('{"a": 1}').fingerprint != stage('{"a": 2}').fingerprint


def test_a_model_of_the_hub_is_told_by_its_commit(monkeypatch):
    def facts(commit, **fields):
        config = SimpleNamespace(_commit_hash=commit)
        monkeypatch.setattr(models, "load_model_config", lambda path, section: config)
        section = ModelSection(path="someone/model", **fields)
        return facts_of(ModelSource(section.path, section))

    assert facts("abc") == {"hub": "someone/model", "commit": "abc"}
    assert facts("abc") != facts("def")
    assert facts(None, revision="v1") == {"hub": "someone/model", "commit": "v1"}


def test_a_path_says_not_what_is_there(tmp_path):
    with pytest.raises(TypeError, match="expected an option that can be told from others"):
        _ = Stage("base", nothing, Options(more=Path("model"))).fingerprint


def test_a_folder_is_told_by_what_is_in_it(tmp_path):
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    here, there = (Options(more=OutsideFolder(tmp_path / n)) for n in ("here", "there"))
    before = facts_of(here)
    assert before == facts_of(there)
    (tmp_path / "here" / "config.json").write_text('{"more": 1}')
    assert facts_of(here) != before
    (tmp_path / "there" / "notes.log").write_text("of no weight")
    assert facts_of(there) == before
    # a file that is only touched is read again, and is the same
    os.utime(tmp_path / "there" / "config.json", (1, 1))
    assert facts_of(there) == before


def _closure():
    seen = 3
    return lambda context: seen


class Builder:
    def build(self, context):
        pass


@pytest.mark.parametrize(
    "build", [_closure(), Builder().build, partial(nothing)], ids=["closure", "method", "partial"]
)
def test_a_build_that_could_see_something_else_is_refused(build):
    with pytest.raises(TypeError, match="sees its context alone"):
        Stage("base", build, Options())


def test_options_that_may_change_are_refused():
    @dataclass
    class Loose:
        text: str = "a"

    for options in (Loose(), {"text": "a"}):
        with pytest.raises(TypeError, match="expected frozen options, got"):
            Stage("base", nothing, options)


def test_a_live_object_is_told_by_what_is_said_of_it():
    same, other = Live(object(), ["a", 1]), Live(object(), ["a", 2])
    assert facts_of(Options(more=same)) == facts_of(Options(more=Live(object(), ["a", 1])))
    assert facts_of(Options(more=same)) != facts_of(Options(more=other))

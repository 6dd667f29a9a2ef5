"""Models that a job builds: what their weights depend on is what their stage is told by."""

from dataclasses import replace

import pytest

from modxfer_fast.config import ModelSection, StudentSection
from modxfer_fast.data import train_tokenizer
from modxfer_fast.jobs.distill.material import Material
from modxfer_fast.jobs.distill.models import model_stage
from modxfer_fast.report import JobConsole
from tests.cli.conftest import TINY

SIZES = TINY["student"]["config"]


@pytest.fixture(scope="module")
def material():
    tokenizer = train_tokenizer(["import return def class while"] * 4, 300)
    return Material(JobConsole(is_main=False), None, tokenizer, None, "causal_lm", "rows")


def fingerprint(material, section=StudentSection, seed=0, **fields):
    stage = model_stage(section(config=SIZES, **fields), "student", material, seed=seed)
    return stage.fingerprint


def test_a_model_that_is_there_has_no_stage(material):
    assert model_stage(ModelSection(path="there"), "teacher", material, seed=0) is None


def test_fresh_weights_depend_on_seed_and_dtype_and_on_no_rows(material):
    fresh = fingerprint(material)
    assert fingerprint(material, seed=1) != fresh
    assert fingerprint(material, dtype="bfloat16") != fresh
    assert fingerprint(replace(material, digest="other rows")) == fresh


def test_adapters_are_no_part_of_the_base(material):
    lora = {"r": 2, "target_modules": ["q_proj"]}
    assert fingerprint(material, peft=lora) == fingerprint(material)


@pytest.mark.parametrize("pretrain", [{}, {"max_steps": 3}], ids=["defaults", "given"])
def test_pretrained_weights_depend_on_rows_arguments_and_processes(pretrain, material):
    trained = fingerprint(material, pretrain=pretrain)
    assert trained != fingerprint(material)
    assert trained == fingerprint(material, pretrain=pretrain, seed=1)  # it has a seed of its own
    assert trained != fingerprint(material, pretrain={**pretrain, "seed": 1})
    assert trained != fingerprint(replace(material, digest="other rows"), pretrain=pretrain)
    assert trained == fingerprint(material, pretrain={**pretrain, "hub_token": "hf_secret"})
    assert trained != fingerprint(replace(material, processes=2), pretrain=pretrain)


def test_pretraining_with_its_defaults_is_pretraining(material):
    section = ModelSection(config=SIZES, pretrain={})
    stage = model_stage(section, "teacher", material, seed=0)
    assert stage.options.pretrain == {}
    assert stage.options.material is material
    assert stage.resumable
    assert stage.on_all_ranks

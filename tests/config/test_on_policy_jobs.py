"""Jobs with an on_policy section."""

import pytest
import yaml

from modxfer_fast.config import ConfigError, dump_config, load_config
from modxfer_fast.data import load_corpus
from modxfer_fast.jobs.distill.job import DistillJob
from modxfer_fast.report import JobConsole

JOB = {
    "output_dir": "out",
    "data": {"source": "python-docs"},
    "teacher": {"path": "some/teacher"},
    "student": {"path": "some/student"},
    "on_policy": {"fraction": 0.5, "prompt_length": 16},
}
VLLM = {"url": "http://gpu-7:8000", "model": "student"}


@pytest.fixture
def load(tmp_path):
    def load(changes):
        path = tmp_path / "job.yaml"
        path.write_text(yaml.safe_dump({**JOB, **changes}))
        return load_config(path)

    return load


def test_rows_are_not_packed(load, tmp_path):
    config = load({})
    assert not config.data.packing
    assert (config.on_policy.max_new_tokens, config.on_policy.temperature) == (128, 1.0)
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "again.yaml") == config
    assert load({"on_policy": None}).data.packing


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"on_policy": {"fraction": 1.5}}, "on_policy.fraction: "),
        ({"on_policy": {"fraction": -1}}, "on_policy.fraction: "),
        ({"on_policy": {"temperature": 0}}, "on_policy.temperature: "),
        ({"on_policy": {"top_p": 0}}, "on_policy.top_p: "),
        ({"on_policy": {"lmbda": 1}}, "on_policy.lmbda: unknown key"),
        ({"data": {"source": "s", "packing": True}}, "data.packing: expected false with on_policy"),
        (
            {"teacher": {"path": "t", "plan": "cached"}},
            "teacher.plan: expected one that",
        ),
        ({"loss": {"kd_weight": 0.0, "ce_weight": 1.0}}, "loss.kd_weight: expected more than 0"),
        (
            {"on_policy": {"prompt_length": 1024}},
            "expected less than data.max_length",
        ),
        (
            {"on_policy": {"max_length": 1023}},
            "expected at least data.max_length",
        ),
        ({"on_policy": {"vllm": VLLM, "batch_size": 8}}, "on_policy: batch_size: expected nothing"),
        ({"on_policy": {"vllm": {"url": "gpu-7"}}}, "on_policy.vllm.model: missing"),
        (
            {"on_policy": {"vllm": {**VLLM, "url": "gpu-7:8000"}}},
            "on_policy.vllm: url: expected http://HOST:PORT or https://HOST, got gpu-7:8000",
        ),
        ({"on_policy": {"vllm": {**VLLM, "sync_frequency": 0}}}, "on_policy.vllm.sync_frequency: "),
        ({"on_policy": {"vllm": VLLM}}, "student.peft: expected LoRA with on_policy.vllm"),
        ({"training": {"on_policy": {}}}, "training.on_policy: set by the on_policy section"),
    ],
)
def test_what_cannot_work_is_told_by_key(load, sections, message):
    with pytest.raises(ConfigError) as error:
        DistillJob(load(sections)).check()
    assert message in str(error.value)


def test_an_encoder_writes_nothing(load):
    changes = {"kind": "encoder", "loss": {"hidden_states": {"layers": {1: 2}}}}
    with pytest.raises(ConfigError, match="on_policy: expected nothing with kind: encoder"):
        load(changes)


def test_plain_text_needs_a_length_of_its_prompts(load, tmp_path):
    source = tmp_path / "texts.jsonl"
    source.write_text('{"text": "a text"}\n{"text": "another"}\n')
    config = load({"data": {"source": str(source)}, "on_policy": {}})
    assert load_corpus(config.data).parts[0].train_format == "text"
    with pytest.raises(ConfigError, match=r"on_policy\.prompt_length: expected a number of tokens"):
        _ = DistillJob(config, JobConsole(is_main=False)).documents
    source.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "c", "completion": "d"}\n')
    config = load({"data": {"source": str(source)}, "on_policy": {}})
    assert DistillJob(config, JobConsole(is_main=False)).documents.num_train == 1

"""Each silent failure of DeepSpeed beside Trainer is turned into an error, or does not happen."""

import importlib.metadata
import json
import os

import pytest
import torch
from transformers import TrainingArguments
from transformers.integrations import deepspeed as hf_deepspeed
from transformers.trainer_pt_utils import AcceleratorConfig

from modxfer_fast.engine import DistillConfig, deepspeed

LAUNCHED = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}


@pytest.fixture
def launched(monkeypatch):
    for name, value in LAUNCHED.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_zero_config_leaves_to_the_trainer_what_is_its_own(stage):
    config = deepspeed.zero_config(stage)
    assert config["zero_optimization"]["stage"] == stage
    assert config["gradient_accumulation_steps"] == "auto"
    assert config["gradient_clipping"] == "auto"
    deepspeed.check_config(config)


def test_a_bucket_is_no_larger_than_the_gradients():
    params = [torch.nn.Parameter(torch.zeros(4, 5)), torch.zeros(7)]
    config = deepspeed.zero_config(2)
    deepspeed.fit_bucket(config, params)
    assert config["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 20}
    given = {"zero_optimization": {"reduce_bucket_size": 3}}
    deepspeed.fit_bucket(given, params)
    assert given["zero_optimization"]["reduce_bucket_size"] == 3


@pytest.mark.parametrize(
    "config",
    [
        {"zero_optimization.stage3_prefetch_bucket_size": 1},
        {"zero_optimization": {"offload_param.device": "cpu"}},
    ],
    ids=["top", "nested"],
)
def test_dotted_keys_are_refused_with_the_nested_form(config):
    with pytest.raises(ValueError, match=r"would be ignored silently, nest it: \{'(zero|offload)"):
        deepspeed.check_config(config)


def test_dotted_keys_are_refused_in_a_json_file_too(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization.stage": 2}))
    with pytest.raises(ValueError, match=r"zero_optimization\.stage"):
        DistillConfig(output_dir=str(tmp_path), deepspeed=str(path))
    with pytest.raises(FileNotFoundError, match="deepspeed: expected a JSON file"):
        DistillConfig(output_dir=str(tmp_path), deepspeed=str(tmp_path / "missing.json"))


@pytest.mark.parametrize(
    ("key", "hint"),
    [("zero_optimisation", "did you mean 'zero_optimization'"), ("batch", "knows no such key")],
)
def test_keys_that_deepspeed_does_not_know_are_refused(key, hint):
    with pytest.raises(ValueError, match=f"deepspeed: '{key}' would be ignored silently.*{hint}"):
        deepspeed.check_keys({"train_batch_size": "auto", key: {}})


def test_keys_of_deepspeed_pass():
    known = "optimizer", "scheduler", "aio", "flops_profiler", "activation_checkpointing", "bf16"
    deepspeed.check_keys(dict.fromkeys(known) | deepspeed.zero_config(3))


def test_stage_must_agree_with_the_given_configuration(tmp_path):
    with pytest.raises(ValueError, match="zero_stage: expected 2, as in `deepspeed`, got 3"):
        DistillConfig(output_dir=str(tmp_path), deepspeed=deepspeed.zero_config(2), zero_stage=3)


@pytest.mark.usefixtures("launched")
def test_old_deepspeed_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.19.5")
    with pytest.raises(
        ImportError, match=r"expected >= 0.19.6, got 0.19.5, which scales gradients"
    ):
        deepspeed.check_environment()
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.19.6")
    deepspeed.check_environment()


@pytest.mark.usefixtures("launched")
def test_missing_deepspeed_names_the_extra(monkeypatch):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(ImportError, match=r"modxfer-fast\[engine\]"):
        deepspeed.check_environment()


def without_a_device(args):
    args.accelerator_config = AcceleratorConfig()


@pytest.mark.usefixtures("launched")
def test_the_cpu_switch_of_accelerate_drops_no_deepspeed(monkeypatch, tmp_path):
    """`accelerate launch --cpu` means CPUs, not a training without ZeRO."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(TrainingArguments, "__post_init__", without_a_device)
    started = []
    monkeypatch.setattr(deepspeed, "start", lambda *given: started.append(given))
    monkeypatch.setattr(DistillConfig, "n_gpu", 0)
    args = DistillConfig(output_dir=str(tmp_path), zero_stage=2, ddp_timeout=77, stall_timeout_s=60)
    assert "ACCELERATE_USE_CPU" not in os.environ
    assert args.use_cpu
    assert started == [(True, 77)]


def test_collectives_wait_as_long_as_asked(monkeypatch):
    library, asked = pytest.importorskip("deepspeed"), []
    monkeypatch.setattr(library.comm, "is_initialized", lambda: False)
    monkeypatch.setattr(library, "init_distributed", lambda **given: asked.append(given["timeout"]))
    deepspeed.start(use_cpu=False, timeout_s=77)
    deepspeed.start(use_cpu=False)
    assert [time.total_seconds() for time in asked] == [77, 1800]


def test_a_launcher_is_asked_for(monkeypatch, tmp_path):
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(RuntimeError, match=r"RANK, LOCAL_RANK, WORLD_SIZE not set; .*torchrun"):
        DistillConfig(output_dir=str(tmp_path), zero_stage=2)


def test_launch_flag_of_accelerate_is_contained(monkeypatch):
    name = "ACCELERATE_USE_DEEPSPEED"
    monkeypatch.delenv(name, raising=False)
    with deepspeed.contained_launch_flag():
        os.environ[name] = "true"
    assert name not in os.environ
    monkeypatch.setenv(name, "true")  # set by the launcher: not ours to remove
    with deepspeed.contained_launch_flag():
        pass
    assert os.environ[name] == "true"


def test_a_new_configuration_forgets_the_partitioning_of_an_old_one(tmp_path):
    old = hf_deepspeed.HfDeepSpeedConfig(
        {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1}
    )
    assert hf_deepspeed.is_deepspeed_zero3_enabled()
    DistillConfig(output_dir=str(tmp_path))
    assert not hf_deepspeed.is_deepspeed_zero3_enabled()
    assert old is not None

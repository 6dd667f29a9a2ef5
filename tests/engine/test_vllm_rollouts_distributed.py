"""Two ranks whose student ZeRO-3 divides: a vLLM writes for both as they would themselves."""

from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from modxfer_fast.engine import DistillConfig, DistillTrainer
from modxfer_fast.serving import ServerError
from tests.support.model_server import ModelServer, serving
from tests.support.models import TokenDataset, align_collate
from tests.support.servable import servable_llama, servable_lora

SECTION = {"fraction": 1.0, "prompt_length": 3, "max_new_tokens": 5}


def make_trainer(folder: Path, name: str, vllm: dict | None) -> DistillTrainer:
    args = DistillConfig(
        output_dir=str(folder / name),
        zero_stage=3,
        on_policy={**SECTION, "vllm": vllm},
        divergence="reverse_kl",
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=3e-2,
        save_strategy="no",
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
    )
    student = servable_lora(AutoModelForCausalLM.from_pretrained(folder / "student"))
    teacher = AutoModelForCausalLM.from_pretrained(folder / "teacher")
    trainer = DistillTrainer(
        student, args, teacher, train_dataset=TokenDataset(64), data_collator=align_collate
    )
    trainer.on_policy.sampling = replace(trainer.on_policy.sampling, temperature=0.0)
    return trainer


def train(folder: str, url: str) -> tuple[dict[str, list], str]:
    """The losses of each run, and what a run without a server ends with."""
    losses = {}
    for name, vllm in (("here", None), ("vllm", {"url": url, "model": "tiny"})):
        trainer = make_trainer(Path(folder), name, vllm)
        trainer.train()
        trainer.save_model(str(Path(folder) / name / "model"))
        losses[name] = [e["loss"] for e in trainer.state.log_history if "loss" in e]
    absent = {"url": "http://127.0.0.1:9", "model": "tiny", "retries": 0}
    try:
        make_trainer(Path(folder), "absent", absent).train()
    except ServerError as error:
        return losses, str(error)
    return losses, "nothing"


@pytest.fixture(scope="module")
def results(ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vllm_rollouts")
    servable_llama(97).save_pretrained(folder / "student")
    servable_llama(97, seed=1).save_pretrained(folder / "teacher")
    own = ModelServer(servable_llama(97))
    with serving(own) as url:
        return ranks.run(train, str(folder), url, timeout=300), own, folder


def test_training_is_that_of_a_student_that_writes_here(results):
    ranks, _, folder = results
    for losses, _ in ranks:
        assert losses["vllm"] == losses["here"]
    one, other = (
        load_file(folder / name / "model" / "adapter_model.safetensors")
        for name in ("here", "vllm")
    )
    assert all(value.equal(other[name]) for name, value in one.items())


def test_one_rank_gives_the_server_its_adapters(results):
    _, own, _ = results
    assert [kind for kind, _ in own.changes] == ["load", "load", "unload", "unload"]
    prompts = [body for body in own.requests if body.get("max_tokens") == 5 and body["seed"]]
    assert len(prompts) == 2 * 2 * 2
    assert len({body["seed"] for body in prompts}) == len(prompts)


def test_every_rank_ends_where_there_is_no_server(results):
    for _, told in results[0]:
        assert told.startswith("http://127.0.0.1:9/v1/models: asked for the adapters that it has")

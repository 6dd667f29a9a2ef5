"""Two ranks whose student ZeRO-3 divides: a vLLM writes for both as they would themselves."""

from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from modxfer_fast.config import VLLMSection
from modxfer_fast.engine import DistillConfig, DistillTrainer
from modxfer_fast.engine.on_policy.generation import StudentRollouts
from modxfer_fast.engine.on_policy.vllm import served_lora
from modxfer_fast.serving import ServerError
from tests.support.model_server import ModelServer, serving
from tests.support.models import TokenDataset, align_collate
from tests.support.servable import servable_llama, servable_lora

SECTION = {"fraction": 1.0, "prompt_length": 3, "max_new_tokens": 5}


def train(folder: str, url: str) -> tuple[list, str]:
    """What was written, with what the student would write, and how it ends without a server."""
    args = DistillConfig(
        output_dir=str(Path(folder) / "run"),
        zero_stage=3,
        on_policy={**SECTION, "vllm": {"url": url, "model": "tiny"}},
        divergence="reverse_kl",
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=3e-2,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(Path(folder) / name) for name in ("student", "teacher")
    )
    trainer = DistillTrainer(
        servable_lora(student),
        args,
        teacher,
        train_dataset=TokenDataset(64),
        data_collator=align_collate,
    )
    on_policy = trainer.on_policy
    on_policy.sampling = replace(on_policy.sampling, temperature=0.0)
    rollouts, itself, written = on_policy.rollouts, StudentRollouts(trainer.student), []
    generate = rollouts.generate

    def both(*args, **seeds):
        written.append((generate(*args, **seeds), itself.generate(*args, **seeds)))
        return written[-1][0]

    rollouts.generate = both
    trainer.train()
    rollouts.served = served_lora(VLLMSection(url="http://127.0.0.1:9", model="tiny", retries=0))
    try:
        generate([[5, 6, 7]], on_policy.sampling, seed=0, step=9)
    except ServerError as error:
        return written, str(error)
    return written, "nothing"


@pytest.fixture(scope="module")
def results(ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vllm_rollouts")
    servable_llama(97).save_pretrained(folder / "student")
    servable_llama(97, seed=1).save_pretrained(folder / "teacher")
    own = ModelServer(servable_llama(97))
    with serving(own) as url:
        return ranks.run(train, str(folder), url, timeout=300), own


def test_ranks_get_what_the_student_of_the_step_would_write(results):
    (first, _), (second, _) = results[0]
    assert len(first) == len(second) == 2
    for written, expected in (*first, *second):
        assert written == expected
    assert first[0] != first[1] != second[1]


def test_one_rank_gives_the_server_its_adapters(results):
    own = results[1]
    assert [kind for kind, _ in own.changes] == ["load", "load", "unload", "unload"]
    prompts = [body for body in own.requests if body.get("max_tokens") == 5 and body["seed"]]
    assert len(prompts) == 2 * 2 * 2
    assert len({body["seed"] for body in prompts}) == len(prompts)


def test_every_rank_ends_where_there_is_no_server(results):
    for _, told in results[0]:
        assert told.startswith("http://127.0.0.1:9/v1/models: asked for the adapters that it has")

"""What a vLLM writes is what the student of now would write itself; another server is refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from transformers import TrainerCallback

from modxfer_fast.config import ConfigError, VLLMSection
from modxfer_fast.engine import DistillConfig, DistillTrainer
from modxfer_fast.engine.on_policy.generation import StudentRollouts
from modxfer_fast.engine.on_policy.rollouts import Sampling, StatefulRollouts
from modxfer_fast.engine.on_policy.vllm import VLLMRollouts, check_servable, served_lora
from modxfer_fast.serving import ServerError
from modxfer_fast.serving import client as client_module
from tests.support.model_server import ModelServer, serving
from tests.support.models import TokenDataset, align_collate
from tests.support.servable import move, servable_llama, servable_lora, servable_tokenizer

REPLIES = Path(__file__).parents[1] / "support" / "vllm_lora_replies.json"
VOCAB = 97
PROMPTS = [[5, 9, 11], [7], [3, 4, 5, 6, 7, 8, 12, 40], [60, 61], [7]]
GREEDY = Sampling(max_new_tokens=7, max_length=32, temperature=0.0, stop=(2,))
DRAWN = Sampling(max_new_tokens=7, max_length=32, top_p=0.9, top_k=20, stop=(2,))


def base(seed=0):
    return servable_llama(VOCAB, seed)


@pytest.fixture
def own():
    return ModelServer(base())


@pytest.fixture
def url(own, monkeypatch):
    monkeypatch.setattr(client_module, "_FIRST_PAUSE_S", 0.01)
    with serving(own) as url:
        yield url


def rollouts_of(student, url, folder, **options):
    section = VLLMSection(url=url, model="tiny", retries=1, timeout_s=20.0, **options)
    return VLLMRollouts(student, section, folder)


def here(student, sampling=GREEDY, prompts=PROMPTS):
    return StudentRollouts(student).generate(prompts, sampling, seed=0, step=0)


def written_by(own):
    """Bodies of the completions that were asked for, but those of the comparison."""
    bodies = [body for body in own.requests if "prompt" in body]
    return [body for body in bodies if body["max_tokens"] == 7 and body["seed"]]


def test_they_follow_the_adapter(own, url, tmp_path):
    student = servable_lora(base())
    rollouts = rollouts_of(student, url, tmp_path)
    assert isinstance(rollouts, StatefulRollouts)
    seen = []
    for step in range(3):
        move(student, step)
        written = rollouts.generate(PROMPTS, GREEDY, seed=step, step=step)
        assert written == here(student)
        assert written not in seen
        seen.append(written)
        ((name, (path, _)),) = own.adapters.items()
        assert own.changes[-1][0] == ("load" if step == 0 else "unload")
        assert name.endswith(f"-{step}")
        assert [file.name for file in Path(path).parent.iterdir()] == [str(step)]
    stopped = replace(GREEDY, stop=(2, seen[-1][0][3]))
    assert rollouts.generate(PROMPTS, stopped, seed=0, step=2) == here(student, stopped) != seen[-1]
    assert rollouts.generate(PROMPTS, GREEDY, seed=9, step=2) == seen[-1]
    assert len(own.changes) == 5  # nothing for a step that is repeated
    rollouts.end()
    assert not own.adapters
    assert not list(tmp_path.iterdir())
    assert rollouts.generate(PROMPTS, GREEDY, seed=0, step=2) == seen[-1]  # it may begin again


def test_an_adapter_writes_for_several_steps(own, url, tmp_path):
    student = servable_lora(base())
    rollouts = rollouts_of(student, url, tmp_path, sync_frequency=3)
    first = rollouts.generate(PROMPTS, GREEDY, seed=0, step=4)
    move(student, 1)
    assert rollouts.generate(PROMPTS, GREEDY, seed=0, step=5) == first
    assert rollouts.generate(PROMPTS, GREEDY, seed=0, step=6) == here(student) != first


def test_an_adapter_of_another_name_beside_one_at_rest(own, url, tmp_path):
    student = servable_lora(base())
    student.add_adapter("other", student.peft_config["default"])
    student.set_adapter("other")
    move(student, 3)
    rollouts = rollouts_of(student, url, tmp_path)
    assert rollouts.generate(PROMPTS, GREEDY, seed=0, step=0) == here(student)


def test_draws_follow_the_seed_and_the_sampling(own, url, tmp_path):
    student = servable_lora(base())
    rollouts = rollouts_of(student, url, tmp_path)
    first, again, other = (
        rollouts.generate(PROMPTS, DRAWN, seed=seed, step=0) for seed in (7, 7, 8)
    )
    assert first == again != other
    assert first[1] != first[4]  # of one prompt, under a seed each
    bodies = written_by(own)
    assert {body["seed"] for body in bodies[:5]} == {body["seed"] for body in bodies[5:10]}
    assert len({body["seed"] for body in bodies}) == 10
    asked = {"temperature": 1.0, "top_p": 0.9, "top_k": 20, "stop_token_ids": [2]}
    # what a generation_config beside the served weights says is switched off
    asked |= {"ignore_eos": True, "repetition_penalty": 1.0, "min_p": 0.0}
    assert all(asked.items() <= body.items() for body in bodies)
    assert not any("logit_bias" in body for body in bodies)
    rooms = [min(7, 9 - len(prompt)) for prompt in PROMPTS]
    short = rollouts.generate(PROMPTS, replace(GREEDY, max_length=9, stop=()), seed=0, step=0)
    assert [len(row) for row in short] == rooms == [6, 7, 1, 7, 7]


def test_classes_that_count_in_one_model_alone_are_not_drawn(own, url, tmp_path):
    student, few = servable_lora(base()), replace(GREEDY, num_classes=20)
    written = rollouts_of(student, url, tmp_path).generate(PROMPTS, few, seed=0, step=0)
    assert written == here(student, few) != here(student)


# ---- in a trainer ----

SECTION = {"fraction": 0.8, "prompt_length": 3, "max_new_tokens": 6}


def make_trainer(folder, url=None, callbacks=(), **options):
    section = dict(SECTION)
    if url is not None:
        section["vllm"] = {"url": url, "model": "tiny", **options.pop("vllm", {})}
    args = DistillConfig(
        output_dir=str(folder),
        on_policy=section,
        divergence="reverse_kl",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=3e-2,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        **{"max_steps": 5, "save_strategy": "no", **options},
    )
    trainer = DistillTrainer(
        servable_lora(base()),
        args,
        base(seed=1),
        train_dataset=TokenDataset(64),
        data_collator=align_collate,
        callbacks=list(callbacks),
    )
    sampling = trainer.on_policy.sampling
    trainer.on_policy.sampling = replace(sampling, temperature=options.get("greedy", 0.0))
    return trainer


def trained(trainer):
    """The adapter, and the losses."""
    state = {n: p for n, p in trainer.student.state_dict().items() if "lora_" in n}
    return state, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def assert_equal(one, other):
    assert one[1] == other[1]
    assert all(torch.equal(value, other[0][name]) for name, value in one[0].items())


def test_training_is_that_of_a_student_that_writes_here(own, url, tmp_path):
    """Greedy, so that both write the same as long as the served adapter is that of the step."""
    runs = []
    for where in (None, url):
        trainer = make_trainer(tmp_path / str(where is None), where)
        trainer.train()
        runs.append(trained(trainer))
    assert_equal(*runs)
    assert len([kind for kind, _ in own.changes if kind == "load"]) == 5
    assert not own.adapters


def test_a_resumed_run_equals_a_whole_one_also_with_another_server(url, tmp_path):
    vllm = {"sync_frequency": 4}
    whole = make_trainer(tmp_path, url, vllm=vllm, save_strategy="steps", save_steps=2)
    whole.train()
    kept = tmp_path / "checkpoint-2" / "rollouts_adapter_0"
    assert (kept / "adapter_model.safetensors").is_file()
    with serving(ModelServer(base())) as elsewhere:
        resumed = make_trainer(tmp_path, elsewhere, vllm=vllm)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_equal(*map(trained, (whole, resumed)))


def test_a_server_that_dies_is_told(own, url, tmp_path):
    class Die(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            own.faults = ["reset"] * 100

    trainer = make_trainer(tmp_path, url, [Die()], vllm={"retries": 1})
    with pytest.raises(ServerError, match=rf"^{url}/v1/\w+: asked for .* no answer in 2 tries"):
        trainer.train()


# ---- what cannot work ----


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"use_dora": True}, "use_dora: expected False .* got True"),
        ({"bias": "lora_only"}, "bias: expected none"),
        ({"lora_bias": True}, "lora_bias: expected False"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save: expected None .* got \['lm_head'\]"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices: expected None"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: expected True"),
    ],
)
def test_an_adapter_that_has_no_place_in_a_server_is_refused(changes, told):
    with pytest.raises(ValueError, match=rf"^student\.peft\.{told}"):
        check_servable(LoraConfig(target_modules=["q_proj"], **changes), "student.peft")


def test_a_student_without_lora_is_refused(tmp_path):
    ia3 = get_peft_model(
        base(), IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    )
    two = servable_lora(base())
    two.add_adapter("other", two.peft_config["default"])
    two.base_model.set_adapter(["default", "other"])
    for student, told in (
        (base(), "model: expected LoRA .* got a student that trains whole"),
        (ia3, "model: expected LoRA .* got IA3"),
        (two, "model: expected one active adapter, got default, other"),
    ):
        with pytest.raises(ValueError, match=told):
            rollouts_of(student, "http://nowhere:1", tmp_path)


def test_a_server_with_another_base_is_refused(own, url, tmp_path):
    own.model = base(seed=1)
    with pytest.raises(ServerError, match="expected the base of the student behind tiny; its log"):
        rollouts_of(servable_lora(base()), url, tmp_path).generate(PROMPTS, DRAWN, seed=0, step=0)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"max_lora_rank": None}, "LoRA is not enabled.*start vLLM with --enable-lora and VLLM_A"),
        ({"max_lora_rank": 2}, "LoRA rank 4 is greater than max_lora_rank 2"),
        ({"name": "other"}, "expected tiny among them, got other"),
        ({"max_model_len": 31}, "expected room for 32 tokens, .* got a max_model_len of 31"),
    ],
)
def test_a_server_that_cannot_write_is_told(tmp_path, monkeypatch, changes, told):
    monkeypatch.setattr(client_module, "_FIRST_PAUSE_S", 0.01)
    student = servable_lora(base())

    def begin(rollouts):
        rollouts.served.check(32)
        rollouts.generate(PROMPTS, GREEDY, seed=0, step=0)

    with serving(ModelServer(base(), **changes)) as url, pytest.raises(ServerError, match=told):
        begin(rollouts_of(student, url, tmp_path))


def test_a_server_that_sees_no_files_is_told(url, tmp_path, monkeypatch):
    rollouts = rollouts_of(servable_lora(base()), url, tmp_path)
    load = rollouts.served.load
    monkeypatch.setattr(rollouts.served, "load", lambda name, path: load(name, f"/other{path}"))
    with pytest.raises(ServerError, match=r"No adapter found.*must see adapter_dir under the same"):
        rollouts.generate(PROMPTS, GREEDY, seed=0, step=0)


def test_adapters_may_not_be_changeable(own, url, monkeypatch):
    gone = {"detail": "Not Found"}
    monkeypatch.setattr(own, "answered", lambda path, body: (404, gone))
    with pytest.raises(ServerError, match=r"status 404: .*Not Found.*start vLLM with --en"):
        served_lora(VLLMSection(url=url, model="tiny")).check(32)


def test_no_key_and_no_server_are_told():
    with pytest.raises(ConfigError, match=r"on_policy\.vllm\.api_key_env: expected the key in NO_"):
        served_lora(VLLMSection(url="http://nowhere:1", model="tiny", api_key_env="NO_SUCH_KEY"))
    section = VLLMSection(url="http://127.0.0.1:9", model="tiny", retries=0)
    with pytest.raises(ServerError, match=r"^http://127\.0\.0\.1:9/v1/models: asked for "):
        served_lora(section).check(32)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"token_ids": None}, "NoneType"),
        ({"token_ids": []}, "expected 1 to 7 tokens, got 0"),
        ({"token_ids": [5] * 8}, "expected 1 to 7 tokens, got 8"),
        ({"logprobs": {"token_logprobs": []}}, "expected 2 logprobs, got 0"),
        ({"prompt_token_ids": [6]}, "that of another"),
    ],
)
def test_a_reply_that_is_no_completion_is_refused(own, url, monkeypatch, change, told):
    choice = {"prompt_token_ids": [5], "token_ids": [5, 6], "logprobs": {"token_logprobs": [0, 0]}}
    reply = {"choices": [{**choice, **change}]}
    monkeypatch.setattr(own, "completions", lambda body: (200, reply))
    served = served_lora(VLLMSection(url=url, model="tiny"))
    with pytest.raises(ServerError, match=f"another reply came: .*{told}"):
        served.write("tiny", [5], 7, seed=0).result()


def test_what_a_killed_run_left_goes(own, url, tmp_path):
    student = servable_lora(base())
    alive = rollouts_of(student, url, tmp_path)
    alive.generate(PROMPTS, GREEDY, seed=0, step=0)
    left = tmp_path / ".adapter-abcdefgh.scratch" / "3"
    student.save_pretrained(left)
    elsewhere = tmp_path / "of-others" / "a" / "b"
    student.save_pretrained(elsewhere)
    for name, path in (("left", left), ("theirs", elsewhere)):
        served_lora(alive.section).load(name, str(path))
    rollouts_of(student, url, tmp_path).generate(PROMPTS, GREEDY, seed=0, step=0)
    assert not left.exists()
    assert len(own.adapters) == 3
    assert "left" not in own.adapters


# ---- the stand-in ----


def test_the_stand_in_changes_adapters_as_vllm_did(tmp_path):
    own = ModelServer(servable_llama(len(servable_tokenizer())), servable_tokenizer())
    servable_lora(base()).save_pretrained(tmp_path / "adapter")
    servable_lora(base(), rank=16).save_pretrained(tmp_path / "wide")
    for recorded in json.loads(REPLIES.read_text()):
        body = recorded["request"]
        if body is None:
            status, reply = own.models()
            assert [(card["id"], card["parent"]) for card in reply["data"]] == [
                (card["id"], card["parent"]) for card in recorded["reply"]["data"]
            ]
            assert [card.keys() for card in reply["data"]] == [
                card.keys() for card in recorded["reply"]["data"]
            ]
            continue
        if "lora_path" in body:
            body = {**body, "lora_path": str(tmp_path / body["lora_path"])}
        status, reply = own.answered(recorded["path"], body)
        assert status == recorded["status"]
        if "choices" not in recorded["reply"]:
            assert reply == recorded["reply"]
            continue
        (choice,), (told,) = reply["choices"], recorded["reply"]["choices"]
        for key in ("token_ids", "prompt_token_ids", "finish_reason"):
            assert choice[key] == told[key]
        assert choice["logprobs"].keys() == told["logprobs"].keys()
        values = (each["logprobs"]["token_logprobs"] for each in (choice, told))
        torch.testing.assert_close(*map(torch.tensor, values), rtol=1e-4, atol=1e-4)

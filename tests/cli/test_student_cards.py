"""A finished student has a model card, and goes to the hub when the whole job is done."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from huggingface_hub import HfApi, ModelCard

from modxfer_fast.cli.main import main

LORA = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}
SMALL = {"compare": {"ce_only": False, "loss_rows": None}, "student": {"peft": LORA}}


class Hub:
    """Stands in for the hub: what is asked of it, and what the output was then."""

    def __init__(self, monkeypatch, out, role="write"):
        self.sent, self.asked = {}, []
        monkeypatch.setattr(HfApi, "whoami", lambda api, token=None: self._account(role))
        monkeypatch.setattr(HfApi, "create_repo", self._create)
        monkeypatch.setattr(HfApi, "upload_folder", self._upload)
        self.out = out

    def _account(self, role):
        self.asked.append("whoami")
        return {"name": "me", "auth": {"accessToken": {"role": role}}}

    def _create(self, name, private=None, exist_ok=False):
        assert (self.out / "report.json").is_file(), "the job was not finished"
        self.asked.append(f"create {name} private={private}")
        return type("Url", (str,), {"repo_id": f"me/{name}"})(f"https://hub/me/{name}")

    def _upload(self, repo_id, folder_path, revision=None, commit_message=None):
        self.asked.append(f"upload {repo_id}")
        self.sent = {p.name: p.read_bytes() for p in Path(folder_path).iterdir() if p.is_file()}
        return SimpleNamespace()


@pytest.fixture(scope="module")
def job(tmp_path_factory, write_job, shared):
    path, out = write_job(
        tmp_path_factory.mktemp("card"),
        training={
            "max_steps": 2, "push_to_hub": True, "hub_model_id": "small", "hub_token": "hf_secret",
            "hub_private_repo": True,
        },
        **SMALL,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODXFER_CACHE", str(shared / "cache"))
        hub = Hub(patch, out)
        assert main(["distill", str(path)]) == 0
    return path, out, hub


def test_the_card_says_what_the_student_is(job):
    _, out, _ = job
    card = ModelCard.load(out / "seed-0" / "student" / "README.md")
    assert card.data.library_name == "peft"
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.tags == ["modxfer_fast", "knowledge-distillation", "lora"]
    report = json.loads((out / "report.json").read_text())
    for role in (report["teacher"], report["runs"][0]["start"], report["runs"][0]["student"]):
        assert f"{role['eval_perplexity']:.4g}" in card.text
    assert "hf_secret" not in card.content
    assert "More Information Needed" not in card.content, "this is PEFT's own card"


def test_the_job_of_a_card_is_the_job(job, tmp_path):
    _, out, _ = job
    text = (out / "seed-0" / "student" / "README.md").read_text()
    again = text.rpartition("```yaml\n")[2].rpartition("\n```")[0]
    assert yaml.safe_load(again) == yaml.safe_load((out / "config.yaml").read_text())
    assert "modxfer distill job.yaml" in text


def test_the_finished_student_is_sent_once(job):
    _, out, hub = job
    assert hub.asked == ["whoami", "create small private=True", "upload me/small"]
    student = out / "seed-0" / "student"
    assert {"README.md", "adapter_model.safetensors", "adapter_config.json"} <= set(hub.sent)
    assert all((student / name).read_bytes() == sent for name, sent in hub.sent.items())


def test_a_hub_that_fails_at_the_end_leaves_the_output_whole(
    tmp_path, write_job, monkeypatch, capsys
):
    path, out = write_job(tmp_path, training={"max_steps": 2, "push_to_hub": True}, **SMALL)
    Hub(monkeypatch, out)

    def refuse(api, *args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(HfApi, "upload_folder", refuse)
    assert main(["distill", str(path)]) != 0
    told = capsys.readouterr()
    assert "hf upload out" in " ".join((told.out + told.err).split())
    assert (out / "seed-0" / "student" / "adapter_model.safetensors").is_file()


def test_tokens_and_keys_that_cannot_do_are_told_early(tmp_path, write_job, monkeypatch, capsys):
    for training, seeds, role, message in (
        ({"push_to_hub": True}, [0], "read", "expected a token that may write"),
        ({"push_to_hub": True}, [0, 1], "write", "training.push_to_hub: expected one seed"),
        ({"hub_strategy": "every_save"}, [0], "write", "training.hub_strategy: set by the job"),
    ):
        path, out = write_job(tmp_path, training=training, seeds=seeds, **SMALL)
        hub = Hub(monkeypatch, out, role)
        assert main(["distill", str(path)]) != 0
        told = capsys.readouterr()
        assert message in " ".join((told.out + told.err).split())
        assert not hub.sent
        assert not out.exists()

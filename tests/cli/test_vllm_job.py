"""`modxfer distill` with a vLLM that writes the completions: it follows, or is refused."""

import json

import pytest

from modxfer_fast.cli.main import EXIT_USER_ERROR, main
from modxfer_fast.config import load_config
from modxfer_fast.jobs.output import changes
from tests.cli.conftest import WORDS
from tests.support.model_server import ModelServer, serving
from tests.support.servable import save_servable

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of a teacher and of a student, and the student."""
    folder = tmp_path_factory.mktemp("models")
    save_servable(folder / "teacher", seed=1)
    return folder / "teacher", folder / "student", save_servable(folder / "student")


@pytest.fixture
def write(write_job, models, tmp_path):
    def write(name, url, **fields):
        folder = tmp_path / name
        folder.mkdir()
        source = folder / "prompts.jsonl"
        pairs = [{"prompt": " ".join(WORDS[:i]), "completion": " pass"} for i in range(1, 9)]
        source.write_text("".join(json.dumps(pair) + "\n" for pair in 4 * pairs))
        fields = {"student": {"peft": LORA}, **fields}
        return write_job(
            folder,
            tokenizer={"vocab_size": None, "path": str(models[0])},
            data={"source": str(source), "packing": False},
            teacher={"config": None, "pretrain": None, "path": str(models[0])},
            student={"config": None, "path": str(models[1]), **fields.pop("student")},
            on_policy={
                "fraction": 1.0,
                "max_new_tokens": 4,
                "vllm": {"url": url, "model": "tiny", "retries": 0},
            },
            loss={"divergence": "reverse_kl"},
            training={"max_steps": 3, "eval_strategy": "no", "logging_steps": 1},
            compare={"ce_only": False, "loss_rows": None},
            **fields,
        )

    return write


def test_the_server_follows_a_job(write, models, tmp_path):
    own = ModelServer(models[2])
    with serving(own) as url:
        path, out = write("job", url)
        assert main(["distill", str(path)]) == 0
        config = load_config(path)
        elsewhere, _ = write("elsewhere", "http://other:1")
    run = json.loads((out / "report.json").read_text())["runs"][0]["student"]
    assert sum("generation_s" in entry for entry in run["history"]) == 3
    assert len([kind for kind, _ in own.changes if kind == "load"]) == 3
    assert not own.adapters
    assert not list(out.rglob(".adapter-*"))
    same = load_config(elsewhere).on_policy
    assert same.vllm != config.on_policy.vllm
    assert same.vllm.identity == config.on_policy.vllm.identity
    differing = changes(out / "config.yaml", config.model_copy(update={"on_policy": same}))
    assert not differing


@pytest.mark.parametrize(
    ("student", "told"),
    [
        ({"peft": LORA}, "http://127.0.0.1:9/v1/models: asked for the models that it serves"),
        ({"peft": None}, "student.peft: expected LoRA with on_policy.vllm"),
        ({"peft": {"type": "ia3"}}, "alone, got ia3"),
        ({"peft": {**LORA, "use_dora": True}}, "student.peft.use_dora: expected False with on_"),
        ({"peft": LORA, "path": None, "config": {"model_type": "llama"}}, "student: expected a pa"),
    ],
)
def test_what_cannot_work_ends_before_anything_loads(write, capsys, student, told):
    path, out = write("job", "http://127.0.0.1:9", student=student)
    assert main(["distill", str(path)]) == EXIT_USER_ERROR
    assert told in capsys.readouterr().err
    assert not list(out.parent.rglob("*.safetensors"))

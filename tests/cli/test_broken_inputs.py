"""Models and data that cannot work end a job with one clear message, before the long phases."""

import json

import pytest

from modxfer_fast.cli.main import main
from modxfer_fast.data import train_tokenizer
from modxfer_fast.kernels import dispatch
from tests.support.models import tiny_llama

QUICK = {
    "tokenizer": None,
    "training": {"max_steps": 1, "save_strategy": "no", "eval_strategy": "no", "eval_steps": None},
    "compare": {"ce_only": False, "loss_rows": None},
}


@pytest.fixture(scope="module")
def tokenizer(shared):
    lines = (shared / "corpus.jsonl").read_text().splitlines()
    return train_tokenizer([json.loads(line)["text"] for line in lines], 320)


@pytest.fixture
def write_pair(tmp_path, write_job, tokenizer):
    """Writes a job on a teacher and a student in folders, which the caller may change first."""

    def write(teacher=None, student=None, **changes):
        sections = {}
        for name, model in (("teacher", teacher), ("student", student)):
            folder = tmp_path / name
            (model or tiny_llama(vocab_size=len(tokenizer))).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            sections[name] = {"path": str(folder), "config": None, "pretrain": None}
            sections[name].update(changes.pop(name, {}))
        del sections["student"]["pretrain"]
        return write_job(tmp_path, **{**QUICK, **sections, **changes})

    return write


def error_of(path, capsys, *options) -> str:
    assert main(["distill", str(path), *options]) == 2
    captured = capsys.readouterr()
    assert "held-out perplexity" not in captured.out
    return captured.err


@pytest.mark.parametrize("packing", ["true", "false"])
@pytest.mark.parametrize("role", ["teacher", "student"])
def test_broken_weights(write_pair, tokenizer, capsys, role, packing):
    model = tiny_llama(vocab_size=len(tokenizer))
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    path, out = write_pair(**{role: model})
    assert main(["distill", str(path), "--set", f"data.packing={packing}"]) == 2
    error = capsys.readouterr().err
    assert f"{role}: expected weights that are finite" in error
    assert "model.layers.1.mlp.up_proj.weight" in error
    assert not out.exists()


@pytest.mark.parametrize("content", ["{", "{}", ""])
def test_a_broken_tokenizer_is_not_an_absent_one(write_pair, tmp_path, capsys, content):
    path, _ = write_pair()
    (tmp_path / "student" / "tokenizer.json").write_text(content)
    assert "student: cannot be loaded" in error_of(path, capsys).replace(str(tmp_path) + "/", "")


def test_weights_without_a_tokenizer_are_fine(write_pair, tmp_path):
    path, _ = write_pair()
    for file in (tmp_path / "student").glob("tokenizer*"):
        file.unlink()
    assert main(["distill", str(path)]) == 0


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_rows_longer_than_the_positions(write_pair, tokenizer, capsys, role):
    model = tiny_llama(vocab_size=len(tokenizer))
    model.config.max_position_embeddings = 16
    path, _ = write_pair(**{role: model})
    error = error_of(path, capsys)
    assert f"{role}: expected data.max_length of at most 16" in error
    assert "got 24" in error


def test_a_vocabulary_too_small(write_pair, capsys):
    path, _ = write_pair(student=tiny_llama(vocab_size=97))
    assert "student: expected a vocabulary of at least" in error_of(path, capsys)


def test_weights_that_the_teacher_does_not_have(write_pair, capsys):
    path, _ = write_pair()
    take = ("--set", "student={from_teacher: {layers: [0, 7]}}")
    assert "student.from_teacher.layers: expected blocks 0 to 1 of the teacher, got 7" in error_of(
        path, capsys, *take
    )


def test_kernels_that_cannot_run_here(write_pair, capsys, monkeypatch):
    monkeypatch.setattr(dispatch, "availability", lambda room, backend: (False, f"no {backend}"))
    path, _ = write_pair()
    error = error_of(path, capsys, "--set", "loss.backend=cuda")
    assert "loss.backend: linear_kd_loss: no usable backend on" in error
    assert "cuda: no cuda" in error


def test_vocabularies_padded_to_different_sizes(write_pair, tokenizer):
    pair = {
        "teacher": tiny_llama(48, 2, seed=1, vocab_size=len(tokenizer) + 60),
        "student": tiny_llama(vocab_size=len(tokenizer) + 4),
    }
    compare = {"ce_only": True, "loss_rows": 4, "loss_repeats": 1}
    path, out = write_pair(**pair, compare=compare)
    assert main(["distill", str(path)]) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["runs"][0]["student"]["eval_kd"] > 0


def test_the_message_about_a_wrapped_head_names_the_student(write_pair, tmp_path, capsys):
    path, _ = write_pair()
    peft = '{"r": 2, "target_modules": ["q_proj", "lm_head"]}'
    assert main(["distill", str(path), "--set", f"student.peft={peft}"]) == 2
    error = capsys.readouterr().err
    assert "modxfer: student: expected an output head without an adapter" in error


def test_rows_left_out_are_counted_in_the_console(write_pair, tmp_path, capsys):
    def chat(answer):
        return {"messages": [{"role": "user", "content": "import"}, answer]}

    chats = [chat({"role": "assistant", "content": f"\n\nreturn {i}"}) for i in range(12)]
    chats += [chat({"role": "user", "content": "def"}), {"messages": None}]
    source = tmp_path / "chats.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in chats))
    path, _ = write_pair(data={"source": str(source), "max_length": 64, "eval_fraction": 0.1})
    assert main(["distill", str(path)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "left out 1 of" in said
    assert "expected a turn of the assistant, got none" in said

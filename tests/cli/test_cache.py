"""`modxfer cache`, and `modxfer distill` from what it kept, as from the teacher itself."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from modxfer_fast.cli.main import EXIT_USER_ERROR, main
from modxfer_fast.config import load_config
from modxfer_fast.jobs.distill.job import DistillJob
from modxfer_fast.teacher_cache import TeacherCache, documents_in

TOP_K = 12
NO_COMPARISON = {"ce_only": False, "loss_rows": None}


def distilled(tmp_path, write_job, name, **changes):
    """Report and weights of the student of one job."""
    folder = tmp_path / name
    folder.mkdir()
    path, out = write_job(folder, compare=NO_COMPARISON, **changes)
    assert main(["distill", str(path)]) == 0
    report = json.loads((out / "report.json").read_text())
    return report, load_file(out / "seed-0" / "student" / "model.safetensors")


@pytest.fixture(scope="module")
def answers(tmp_path_factory, write_job, shared):
    """A cache with both payloads of the job's teacher."""
    folder = tmp_path_factory.mktemp("cache")
    kept = {"folder": str(folder / "answers"), "top_k": TOP_K}
    path, _ = write_job(folder, teacher={"cache": kept})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODXFER_CACHE", str(shared / "cache"))
        assert main(["cache", str(path)]) == 0
    return folder / "answers"


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_student_of_cached_states_is_that_of_the_teacher(
    tmp_path, write_job, answers, accumulation
):
    training = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 4}
    teacher = {"plan": "cached", "cache": {"folder": str(answers), "top_k": TOP_K}}
    local, expected = distilled(tmp_path, write_job, "local", training=training)
    told, got = distilled(tmp_path, write_job, "cached", training=training, teacher=teacher)
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-4, atol=1e-5)
    of_local, of_told = (report["runs"][0]["student"] for report in (local, told))
    assert of_told["eval_kd"] == pytest.approx(of_local["eval_kd"], rel=1e-4)
    assert told["teacher"]["signal"] == "hidden"


def test_listed_classes_teach_nearly_as_much(tmp_path, write_job, answers):
    cache = {"folder": str(answers), "top_k": TOP_K, "signal": "topk"}
    local, _ = distilled(tmp_path, write_job, "local")
    told, _ = distilled(tmp_path, write_job, "told", teacher={"plan": "cached", "cache": cache})
    of_local, of_told = (report["runs"][0] for report in (local, told))
    assert told["teacher"]["signal"] == "topk"
    # a divergence of K + 1 classes is less than that of all, and training lowers it as well
    assert of_told["start"]["eval_kd"] < of_local["start"]["eval_kd"]
    assert of_told["student"]["eval_kd"] < 0.9 * of_told["start"]["eval_kd"]
    assert of_told["student"]["eval_perplexity"] == pytest.approx(
        of_local["student"]["eval_perplexity"], rel=0.1
    )


def test_a_temperature_that_listed_classes_cannot_have(tmp_path, write_job, answers, capsys):
    cache = {"folder": str(answers), "top_k": TOP_K, "signal": "topk"}
    path, _ = write_job(
        tmp_path,
        compare=NO_COMPARISON,
        teacher={"plan": "cached", "cache": cache},
        loss={"temperature": 2.0},
    )
    assert main(["distill", str(path)]) == EXIT_USER_ERROR
    assert "loss.temperature: expected 1 with listed classes" in capsys.readouterr().err


def test_a_second_capture_asks_for_nothing(tmp_path, write_job, answers, capsys):
    before = sorted(p.name for p in (answers / "shards").iterdir())
    path, _ = write_job(tmp_path, teacher={"cache": {"folder": str(answers), "top_k": TOP_K}})
    assert main(["cache", str(path)]) == 0
    assert sorted(p.name for p in (answers / "shards").iterdir()) == before


def test_documents_that_were_not_captured_are_told(tmp_path, write_job, answers, capsys):
    whole = next((answers / "shards").iterdir())
    part = tmp_path / "part"
    shutil.copytree(answers, part)
    shutil.rmtree(part / "shards" / whole.name)
    teacher = {"plan": "cached", "cache": {"folder": str(part)}}
    path, out = write_job(tmp_path, compare=NO_COMPARISON, teacher=teacher)
    assert main(["distill", str(path)]) == EXIT_USER_ERROR
    told = capsys.readouterr().err
    assert "expected answers to all" in told
    assert "are not there; `modxfer cache` asks for them" in told
    assert not out.exists()


def test_another_teacher_is_refused(tmp_path, write_job, answers, capsys):
    teacher = {"pretrain": {"max_steps": 3}, "plan": "cached", "cache": {"folder": str(answers)}}
    path, _ = write_job(tmp_path, compare=NO_COMPARISON, teacher=teacher)
    assert main(["distill", str(path)]) == EXIT_USER_ERROR
    assert "is of another teacher; weights: expected" in capsys.readouterr().err


def test_states_that_another_program_kept_teach_as_well(tmp_path, write_job, capsys):
    folder = tmp_path / "theirs"
    folder.mkdir()
    teacher = {
        "plan": "cached",
        "cache": {"folder": str(tmp_path / "ours")},
        "pretrain": {"max_steps": 100},  # one that knows more than how frequent a token is
    }
    path, _ = write_job(tmp_path, compare=NO_COMPARISON, teacher=teacher)
    job = DistillJob(load_config(path))
    model = job.load_teacher(job.teacher_source())
    before = []
    model.model.norm.register_forward_pre_hook(lambda _, given: before.append(given[0][0]))
    rows = job.material.rows
    documents = list(documents_in([*rows.train, *rows.held_out], rows.collator))
    behind = []
    for number, document in enumerate(documents):
        with torch.no_grad():
            behind.append(model.model(input_ids=document.ids.long()[None])[0][0])
        kept = {"hidden_states": before.pop()[:, None].contiguous(), "token_ids": document.ids}
        save_file(kept, folder / f"{number}.safetensors")

    command = ["cache", str(path), "--from", f"vllm:{folder}"]
    assert main(command) == EXIT_USER_ERROR
    assert '(--as "0+norm")' in capsys.readouterr().err
    assert not (tmp_path / "ours").exists()

    assert main([*command, "--as", "0+norm"]) == 0
    assert f"{len(documents)} documents imported" in capsys.readouterr().out
    ours = TeacherCache(tmp_path / "ours")
    assert torch.equal(ours.head()["weight"], model.lm_head.weight)
    for document, expected in zip(documents, behind, strict=True):
        torch.testing.assert_close(ours.read(document)["hidden"], expected)
    assert main(["distill", str(path)]) == 0


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--from", "llama:x"], "--from: expected FORMAT:PATH with a format among vllm, axolotl"),
        (["--from", "vllm"], "--from: expected FORMAT:PATH"),
        (["--as", "3"], "--as: expected --from beside it"),
        (["--from", "vllm:nowhere"], "nowhere: expected a folder of .safetensors files"),
    ],
)
def test_what_cannot_be_imported_is_told(tmp_path, write_job, capsys, options, told):
    path, _ = write_job(tmp_path, compare=NO_COMPARISON)
    assert main(["cache", str(path), *options]) == EXIT_USER_ERROR
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out.cache").exists()

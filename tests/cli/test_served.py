"""Jobs whose teacher is behind an endpoint: as with the same classes told here, and told apart."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from modxfer_fast.cli.main import EXIT_USER_ERROR, main
from modxfer_fast.config import dump_config, load_config
from modxfer_fast.engine import Objective
from modxfer_fast.jobs.output import changes
from modxfer_fast.jobs.plan.job import make_plan
from modxfer_fast.serving import client as client_module
from tests.support.model_server import ModelServer, serving
from tests.support.servable import save_servable, servable_tokenizer

TOP_K = 12
NO_COMPARISON = {"ce_only": False, "loss_rows": None}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A folder with its model and tokenizer."""
    folder = tmp_path_factory.mktemp("teacher")
    return folder, save_servable(folder), servable_tokenizer()


@pytest.fixture
def own(teacher):
    return ModelServer(teacher[1], teacher[2])


@pytest.fixture
def url(own, monkeypatch):
    monkeypatch.setattr(client_module, "_FIRST_PAUSE_S", 0.01)
    with serving(own) as url:
        yield url


@pytest.fixture
def write(write_job, teacher, tmp_path):
    """A function that writes a job of that teacher into a folder of its own."""

    def write(name, given, **fields):
        folder = tmp_path / name
        folder.mkdir()
        path = str(teacher[0])
        return write_job(
            folder,
            tokenizer={"vocab_size": None, "path": path},
            teacher={"config": None, "pretrain": None, "path": path, **given},
            compare=NO_COMPARISON,
            **fields,
        )

    return write


def served(url, **options):
    return {"plan": "served", "served": {"url": url, "model": "tiny", "top_k": TOP_K, **options}}


def distilled(path, out):
    assert main(["distill", str(path)]) == 0
    report = json.loads((out / "report.json").read_text())
    return report, load_file(out / "seed-0" / "student" / "model.safetensors")


def test_online_cached_and_local_classes_teach_the_same(write, own, url, tmp_path):
    own.faults = [None, None, None, None, 503, "reset"]  # behind the looks at the server
    told, got = distilled(*write("served", served(url)))
    assert told["teacher"]["model"] == "tiny"
    before = len(own.requests)

    kept = {**served(url), "cache": {"folder": str(tmp_path / "kept")}}
    path, _ = write("kept", kept)
    assert main(["cache", str(path)]) == 0
    assert len(own.requests) > before
    asked = len(own.requests)
    _, cached = distilled(*write("cached", {**kept, "plan": "cached"}))
    assert len(own.requests) == asked
    assert all(torch.equal(cached[name], tensor) for name, tensor in got.items())

    ours = {"cache": {"folder": str(tmp_path / "ours"), "hidden": False, "top_k": TOP_K}}
    path, _ = write("ours", ours)
    assert main(["cache", str(path)]) == 0
    local, expected = distilled(*write("local", {**ours, "plan": "cached"}))
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-3, atol=1e-4)
    of_local, of_told = (report["runs"][0]["student"] for report in (local, told))
    assert of_told["eval_kd"] == pytest.approx(of_local["eval_kd"], rel=1e-4)


def test_a_step_that_broke_is_run_again_without_the_server(write, own, url, monkeypatch, capsys):
    path, out = write("broken", served(url), training={"max_skipped_steps": 0})
    terms = Objective.terms

    def broken(*args, **kwargs):
        found = terms(*args, **kwargs)
        return found._replace(loss=found.loss * math.inf) if torch.is_grad_enabled() else found

    with monkeypatch.context() as patch:
        patch.setattr(Objective, "terms", broken)
        assert main(["distill", str(path)]) == EXIT_USER_ERROR
    assert "modxfer replay" in capsys.readouterr().err
    (folder,) = out.with_name("out.partial").glob("checkpoints/seed-0/student/nonfinite/step-*")
    asked = len(own.requests)
    assert main(["replay", str(folder)]) == 1
    assert "Now: nothing not finite" in capsys.readouterr().out
    assert len(own.requests) == asked


def test_other_weights_under_the_same_name_fill_no_cache(
    write, teacher, own, url, tmp_path, capsys
):
    kept = {**served(url), "cache": {"folder": str(tmp_path / "kept")}}
    path, _ = write("first", kept)
    assert main(["cache", str(path)]) == 0
    path, _ = write("same", kept)
    assert main(["cache", str(path)]) == 0
    other = save_servable(tmp_path / "other", seed=1)
    with serving(ModelServer(other, teacher[2])) as elsewhere:
        path, _ = write("second", {**served(elsewhere), "cache": kept["cache"]})
        assert main(["cache", str(path)]) == EXIT_USER_ERROR
    assert "it serves other weights under that name" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "fields", "told"),
    [
        ({"model": "other"}, {}, "expected other among them, got tiny"),
        ({"top_k": 21}, {}, "start the server with --max-logprobs 21"),
        ({}, {"data": {"max_length": 128}}, "expected room for 129 tokens"),
        ({}, {"loss": {"temperature": 2.0}}, "set teacher.served.tail: renormalise"),
        ({}, {"loss": {"impl": "dense"}}, "loss.impl: expected fused with listed classes"),
        ({"api_key_env": "NO_SUCH_KEY"}, {}, "expected the key in NO_SUCH_KEY"),
        (
            {"timeout_s": 1300.0},
            {},
            "teacher.served: expected timeout_s and retry_s of less than 1500 s together, "
            "training.stall_timeout_s, got 1600 s",
        ),
    ],
)
def test_a_wrong_server_ends_a_job_before_it_begins(write, url, capsys, options, fields, told):
    path, out = write("job", served(url, **options), **fields)
    assert main(["distill", str(path)]) == EXIT_USER_ERROR
    assert told in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"plan": "served"}, "teacher: served: missing; expected a section with plan: served"),
        (served("http://h") | {"plan": "replica"}, "expected served, or cached, beside a section"),
        (served("host:80"), "url: expected http://HOST:PORT"),
        (served("http://h", top_k=0), "served.top_k"),
        (served("http://h", api="openai"), "served.api"),
        (
            served("http://h") | {"cache": {"top_k": 4}},
            "cache.top_k: expected nothing beside a section served",
        ),
        ({"source": "ema"}, "source: expected plan: self beside it, got ema without"),
        ({"ema_decay": 0.5}, "ema_decay: expected plan: self and source: ema beside it, got 0.5"),
    ],
)
def test_sections_that_contradict_themselves(write, capsys, given, told):
    path, _ = write("job", given)
    assert main(["distill", str(path)]) == EXIT_USER_ERROR
    assert told in capsys.readouterr().err


def test_a_student_takes_no_weights_of_it(write, capsys):
    path, _ = write("job", served("http://h"), student={"from_teacher": {"layers": [0]}})
    assert main(["distill", str(path)]) == EXIT_USER_ERROR
    assert "student.from_teacher: expected nothing with a section" in capsys.readouterr().err


def test_a_server_that_moved_is_no_other_job(write, tmp_path):
    config = load_config(write("job", served("http://here:8000"))[0])
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "config.yaml") == config
    moved = {**served("http://there:8000", timeout_s=9.0), "path": config.teacher.path}
    again = config.model_copy(update={"teacher": type(config.teacher).model_validate(moved)})
    assert not changes(tmp_path / "config.yaml", again)
    more = {**served("http://here:8000"), "path": config.teacher.path}
    more["served"]["top_k"] = 5
    again = config.model_copy(update={"teacher": type(config.teacher).model_validate(more)})
    assert changes(tmp_path / "config.yaml", again) == {"teacher.served.top_k": (TOP_K, 5)}


def test_no_memory_is_planned_for_it(write):
    plan = make_plan(load_config(write("job", served("http://here:8000"))[0]), 2, "h200")
    (teacher,) = [part for part in plan.parts if part.name == "teacher"]
    assert teacher.bytes == 0

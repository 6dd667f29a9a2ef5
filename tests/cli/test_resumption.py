"""`modxfer distill --resume`: stopped anywhere, a job ends as if it never was."""

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from modxfer_fast import files
from modxfer_fast.cli.main import main
from modxfer_fast.engine import DistillTrainer
from modxfer_fast.jobs.distill.job import DistillJob
from modxfer_fast.report import ConsoleCallback
from tests.cli.conftest import job_file, merged

SHORT = {"compare": {"ce_only": False, "loss_rows": None}}
LORA = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture
def write(tmp_path, write_job):
    """Writes a job of one run."""
    return lambda **changes: write_job(tmp_path, **merged(SHORT, changes))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, write_job, shared):
    """The output of the job when nothing stops it."""
    os.environ["MODXFER_CACHE"] = str(shared / "cache")
    path, out = write_job(tmp_path_factory.mktemp("whole"), **SHORT)
    assert main(["distill", str(path)]) == 0
    return out


def assert_as_whole(out, whole):
    weights, expected = (
        load_file(f / "seed-0" / "student" / "model.safetensors") for f in (out, whole)
    )
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    runs = [json.loads((f / "report.json").read_text())["runs"][0]["student"] for f in (out, whole)]
    last, train_loss = (
        [[e[key] for e in run["history"] if key in e][-1] for run in runs]
        for key in ("loss", "train_loss")
    )
    assert last[0] == last[1]
    assert train_loss[0] == pytest.approx(train_loss[1], rel=1e-6)
    assert runs[0]["eval_perplexity"] == runs[1]["eval_perplexity"]


def told(text):
    """Printed text without the breaks of its lines."""
    return " ".join(text.split())


def at_step(step, act):
    """A callback's `on_step_end` that acts in the student's run."""

    def on_step_end(self, args, state, control, **kwargs):
        if args.output_dir.endswith("student") and state.global_step == step:
            act()

    return on_step_end


def test_sigterm_writes_a_checkpoint_and_resume_goes_on(write, whole, monkeypatch, capsys):
    path, out = write()
    with monkeypatch.context() as patch:
        stop = at_step(7, lambda: os.kill(os.getpid(), signal.SIGTERM))
        patch.setattr(ConsoleCallback, "on_step_end", stop)
        before = signal.getsignal(signal.SIGTERM)
        assert main(["distill", str(path), "--resume"]) == 143  # nothing was there: it started
        assert signal.getsignal(signal.SIGTERM) == before
    message = capsys.readouterr().err
    assert message.startswith("modxfer: terminated\n")
    assert "(checkpoints/seed-0/student/checkpoint-7 is whole); --resume goes on" in message
    waits = ["--set", "training.stall_timeout_s=700", "--set", "training.save_total_limit=9"]
    assert main(["distill", str(path), "--resume", *waits]) == 0  # on them no result depends
    assert_as_whole(out, whole)
    capsys.readouterr()
    assert main(["distill", str(path), "--resume"]) == 0
    assert told(capsys.readouterr().out) == told(f"finished already: {out}")


def test_a_checkpoint_is_read_once_before_it_is_resumed(write, monkeypatch):
    path, _ = write()
    with monkeypatch.context() as patch:
        stop = at_step(7, lambda: os.kill(os.getpid(), signal.SIGTERM))
        patch.setattr(ConsoleCallback, "on_step_end", stop)
        assert main(["distill", str(path)]) == 143
    read, original = [], files.sha256_of
    monkeypatch.setattr(files, "sha256_of", lambda file: read.append(str(file)) or original(file))
    assert main(["distill", str(path), "--resume"]) == 0
    compared = [file for file in read if "checkpoint-7/" in file]
    assert len(compared) == len(set(compared)) > 0


def test_sigterm_while_it_evaluates(write, whole, monkeypatch, capsys):
    path, out = write(training={"save_strategy": "no"})
    with monkeypatch.context() as patch:
        stop = at_step(10, lambda: os.kill(os.getpid(), signal.SIGTERM))
        patch.setattr(ConsoleCallback, "on_prediction_step", stop, raising=False)
        assert main(["distill", str(path)]) == 143
    assert "(checkpoints/seed-0/student/checkpoint-10 is whole)" in capsys.readouterr().err
    assert main(["distill", str(path), "--resume"]) == 0
    assert_as_whole(out, whole)


def test_interrupt_says_how_to_go_on(write, monkeypatch, capsys):
    path, out = write()

    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(ConsoleCallback, "on_step_end", at_step(7, interrupt))
    assert main(["distill", str(path)]) == 130
    message = capsys.readouterr().err
    assert message.startswith("modxfer: interrupted\n")
    assert f"{out}.partial (checkpoints/seed-0/student/checkpoint-5 is whole)" in message


def test_a_run_stopped_after_its_last_step_trains_no_further(write, whole, monkeypatch):
    path, out = write()
    with monkeypatch.context() as patch:
        save = DistillTrainer.save_model

        def stopped(self, output_dir=None, _internal_call=False):
            if not _internal_call and self.args.output_dir.endswith("student"):
                raise KeyboardInterrupt
            save(self, output_dir, _internal_call)

        patch.setattr(DistillTrainer, "save_model", stopped)
        assert main(["distill", str(path)]) == 130
    assert main(["distill", str(path), "--resume"]) == 0
    assert_as_whole(out, whole)
    checkpoints = out / "checkpoints" / "seed-0" / "student"
    assert sorted(p.name for p in checkpoints.iterdir()) == ["checkpoint-10", "checkpoint-5"]


def test_a_run_stopped_after_it_was_written_is_only_written_again(write, whole, monkeypatch):
    path, out = write(training={"save_strategy": "no"})

    def stopped(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(DistillJob, "summarise", stopped)
        assert main(["distill", str(path)]) == 130
    assert (out.with_name("out.partial") / "report.json").is_file()
    monkeypatch.setattr(ConsoleCallback, "on_step_end", lambda *a, **k: pytest.fail("it trained"))
    assert main(["distill", str(path), "--resume"]) == 0
    assert_as_whole(out, whole)
    assert not (out / "stages").exists()


def test_a_damaged_checkpoint_is_told_and_passed_over(write, whole, monkeypatch, capsys):
    path, out = write()
    with monkeypatch.context() as patch:
        stop = at_step(7, lambda: os.kill(os.getpid(), signal.SIGTERM))
        patch.setattr(ConsoleCallback, "on_step_end", stop)
        assert main(["distill", str(path)]) == 143
    file = out.with_name("out.partial") / "checkpoints/seed-0/student/checkpoint-7/optimizer.pt"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert main(["distill", str(path), "--resume"]) == 0
    assert "checkpoint-7 is damaged (optimizer.pt)" in told(capsys.readouterr().out)
    assert_as_whole(out, whole)


@pytest.fixture(params=["full", "quota"])
def disk(request, tmp_path):
    """(folder, fill, empty): a disk, and what makes it refuse and take files again."""
    if request.param == "quota":  # any system: files may not become larger
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        yield (
            tmp_path,
            lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1])),
            lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before),
        )
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        return
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no file system can be mounted here ({error})")

    def fill():
        free = os.statvfs(folder)
        (folder / "ballast").write_bytes(bytes(free.f_bavail * free.f_frsize - 60_000))

    yield folder, fill, (folder / "ballast").unlink
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_told_and_the_checkpoint_before_it_stays(
    disk, write_job, whole, monkeypatch, capsys
):
    folder, fill, empty = disk
    path, out = write_job(folder, **SHORT)
    with monkeypatch.context() as patch:
        patch.setattr(ConsoleCallback, "on_step_end", at_step(7, fill))
        code = main(["distill", str(path)])
        empty()
    message = capsys.readouterr().err
    assert code == 2
    assert message.startswith("modxfer: cannot write, the disk is full or refuses (")
    assert "(checkpoints/seed-0/student/checkpoint-5 is whole); --resume goes on" in message
    checkpoints = out.with_name("out.partial") / "checkpoints" / "seed-0" / "student"
    assert [p.name for p in checkpoints.glob("checkpoint-*")] == ["checkpoint-5"]
    assert main(["distill", str(path), "--resume"]) == 0
    assert_as_whole(out, whole)


def test_a_finished_run_goes_on_to_more_steps(write):
    path, out = write()
    assert main(["distill", str(path)]) == 0
    assert main(["distill", str(path), "--resume", "--set", "training.max_steps=14"]) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["config"]["training"]["max_steps"] == 14
    steps = [e["step"] for e in report["runs"][0]["student"]["history"] if "loss" in e]
    assert steps == [2, 4, 6, 8, 10, 12, 14]


def test_a_damaged_model_in_the_cache_is_made_again(write, whole, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("MODXFER_CACHE", str(tmp_path / "cache"))
    path, out = write()
    assert main(["distill", str(path)]) == 0
    report = json.loads((out / "report.json").read_text())
    for role, model in (("teacher", report["teacher"]), ("student", report["runs"][0]["start"])):
        file = Path(model["path"]) / "model.safetensors"
        assert file.is_relative_to(tmp_path / "cache" / role)
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]) if role == "teacher" else b"")
    capsys.readouterr()
    assert main(["distill", str(path), "--set", "overwrite=true"]) == 0
    assert told(capsys.readouterr().out).count("damaged (model.safetensors); it is made again") == 2
    assert_as_whole(out, whole)


def test_an_adapter_needs_no_cache(write, monkeypatch, tmp_path):
    monkeypatch.setenv("MODXFER_CACHE", str(tmp_path / "cache"))
    path, out = write(student={"peft": LORA}, training={"max_steps": 5})
    assert main(["distill", str(path)]) == 0
    (tmp_path / "cache").rename(tmp_path / "emptied")
    ids = torch.arange(5)[None]
    in_place = AutoPeftModelForCausalLM.from_pretrained(out / "seed-0" / "student")(ids).logits
    moved = tmp_path / "elsewhere"
    out.rename(moved)
    base = AutoModelForCausalLM.from_pretrained(moved / "seed-0" / "student_base")
    before = base(ids).logits
    model = PeftModel.from_pretrained(base, moved / "seed-0" / "student")
    assert torch.equal(model(ids).logits, in_place)
    assert not torch.equal(before, in_place)


@pytest.mark.parametrize("stays", [False, True], ids=["asked", "killed"])
def test_a_process_ends_after_its_launcher(stays):
    """Also one that waits for another process and never comes to answer the signal."""
    rank = (
        "import signal, time; from modxfer_fast.jobs import ranks; ranks._GRACE_S = 0.1;"
        f"{stays} and signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "ranks.end_with_launcher(); print('ready', flush=True); time.sleep(100)"
    )
    launcher = (
        "import subprocess, sys;"
        f"subprocess.Popen([sys.executable, '-c', {rank!r}], start_new_session=True).wait()"
    )
    environment = {**os.environ, "TORCHELASTIC_RUN_ID": "x"}
    process = subprocess.Popen(
        [sys.executable, "-c", launcher], stdout=subprocess.PIPE, env=environment, text=True
    )
    assert process.stdout.readline() == "ready\n"
    process.kill()
    assert process.stdout.read() == ""  # the end of the pipe: the rank has closed it too
    process.wait()
    process.stdout.close()


def test_a_finished_job_on_a_task_stays(tmp_path, capsys, monkeypatch):
    from modxfer_fast.config import dump_config
    from modxfer_fast.config.task_distill import load_distill
    from modxfer_fast.jobs.task.distill import TaskDistillJob

    task = {"kind": "ner", "files": {"train": "train.conllu"}, "labels": ["O", "B-LOC", "I-LOC"]}
    base = {
        "kind": "task",
        "task": task,
        "teacher": {"path": "teacher", "training": {"max_steps": 2}},
        "student": {"path": "student"},
        "training": {"max_steps": 2},
    }
    path, out = job_file(tmp_path, base, {})
    out.mkdir()
    (out / "report.json").write_text('{"seconds": 1}')
    (out / "config.yaml").write_text(dump_config(load_distill(path)))
    monkeypatch.setattr(TaskDistillJob, "check", lambda *a: pytest.fail("it began"))
    assert main(["distill", str(path), "--resume"]) == 0
    assert "finished already" in capsys.readouterr().out
    assert main(["distill", str(path)]) == 2


def test_pretraining_goes_on_from_its_checkpoint_in_the_cache(write, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("MODXFER_CACHE", str(tmp_path / "cache"))
    pretrain = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    path, out = write(teacher={"pretrain": pretrain}, training={"max_steps": 2})

    def interrupt(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ConsoleCallback, "on_step_end", interrupt)
        assert main(["distill", str(path)]) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert not out.with_name("out.partial").exists()  # nothing of it is there
    (scratch,) = (tmp_path / "cache" / "teacher").glob(".*.partial")
    assert [p.name for p in (scratch / "checkpoints").glob("checkpoint-*")] == ["checkpoint-3"]
    steps = []

    def note(self, args, state, control, **kwargs):
        steps.append(state.global_step)

    monkeypatch.setattr(ConsoleCallback, "on_step_end", note)
    assert main(["distill", str(path)]) == 0
    assert steps == [4, 5, 6, 1, 2]
    assert not scratch.exists()

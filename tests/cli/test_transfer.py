"""`modxfer transfer` on tiny encoders: stages, their cache, the grid, what is refused."""

import json
import shutil
from statistics import fmean

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForTokenClassification

from modxfer_fast import transfer as package
from modxfer_fast.cli.main import EXIT_USER_ERROR, main
from modxfer_fast.config.grid import load_transfer
from modxfer_fast.engine import NonFiniteError
from modxfer_fast.jobs import job as jobs_job
from modxfer_fast.jobs.task import models as task_models
from modxfer_fast.jobs.task import stages as task_stages
from modxfer_fast.jobs.transfer.job import TransferJob
from modxfer_fast.report import JobConsole
from modxfer_fast.report.transfer_table import read_results
from tests.cli.conftest import job_file, merged, ner_task
from tests.task_inputs import NER_LABELS, save_berts, sentences, write_conllu

TRAINING = {
    "max_steps": 12,
    "per_device_train_batch_size": 8,
    "learning_rate": 1.0e-2,
    "eval_steps": 6,
    "use_cpu": True,
}
LORA = {"type": "lora", "r": 2, "lora_alpha": 4, "target_modules": ["query", "value"]}


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """Text, a teacher of 4 layers x 64, and students of 2 layers x 64 and x 32."""
    folder = tmp_path_factory.mktemp("transfer")
    write_conllu(folder / "train.conllu", sentences(120))
    save_berts(
        folder,
        teacher={"num_layers": 4},
        same={"num_layers": 2, "seed": 1},
        narrow={"num_layers": 2, "hidden_size": 32, "seed": 2},
    )
    return folder


@pytest.fixture
def write(material, tmp_path):
    """Writes a job file and returns it with its output folder."""

    def write(**changes):
        base = {
            "task": ner_task(material),
            "teacher": {"path": str(material / "teacher"), "peft": LORA, "training": TRAINING},
            "student": {"path": str(material / "narrow"), "training": TRAINING},
            "transfer": {"method": "ridge", "statistics": {"examples": 60, "batch_size": 8}},
        }
        return job_file(tmp_path, base, changes)

    return write


def run(path, *more):
    assert main(["transfer", str(path), *more]) == 0


def quiet_job(path):
    return TransferJob(load_transfer(path), JobConsole(is_main=False))


def module_of(job):
    """The folder of the student's module before training."""
    return job.get(job.graph.module)


def refused(capsys, path, *more):
    assert main(["transfer", str(path), *more]) == EXIT_USER_ERROR
    return capsys.readouterr().err


def test_a_module_moves_and_plain_peft_loads_it(write, material, capsys):
    path, out = write()
    run(path)
    report = json.loads((out / "report.json").read_text())
    assert set(report["students"]) == {"scratch", "ridge"}
    assert report["transfer"]["layers"]["sources"] == [[0], [2]]
    assert {fit["space"] for fit in report["transfer"]["fits"]} == {
        "attention_in",
        "query",
        "value",
    }
    assert report["transfer"]["statistics"]["kept_fraction"] == 1.0
    base = AutoModelForTokenClassification.from_pretrained(material / "narrow", num_labels=5)
    model = PeftModel.from_pretrained(base, out / "module")
    moved = [p for name, p in model.named_parameters() if "lora_B" in name]
    assert len(moved) == 4
    assert all(p.abs().max() > 0 for p in moved)  # PEFT's own start is zero
    merged_model = model.merge_and_unload()
    assert not any("lora" in name for name, _ in merged_model.named_parameters())
    provenance = json.loads((out / "module" / "transfer.json").read_text())
    assert provenance["models"]["teacher"]["path"] == str(material / "teacher")
    assert provenance["method"] == "ridge"
    assert (out / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert (out / "student" / "adapter_model.safetensors").is_file()
    assert "ridge" in capsys.readouterr().out


def test_stages_run_once_and_can_be_asked_for_alone(write, monkeypatch, capsys):
    path, out = write(student={"training": {"max_steps": 7}})
    run(path, "--stage", "maps")
    assert not out.exists()
    calls = []
    for module, name in (
        (task_stages, "train_task"),
        (package, "collect_statistics"),
        (package, "fit_maps"),
    ):
        original = getattr(module, name)

        def counted(*args, _original=original, _name=name, **kwargs):
            calls.append(_name)
            return _original(*args, **kwargs)

        monkeypatch.setattr(module, name, counted)
    run(path)
    assert calls == ["train_task", "train_task"]  # scratch and the student; the rest was there
    assert "teacher: from the cache" in capsys.readouterr().out
    run(path, "--set", "overwrite=true")
    assert len(calls) == 2
    capsys.readouterr()
    run(path, "--stage", "verify")
    assert "10 tensors" in capsys.readouterr().out
    run(path, "--stage", "evaluate")
    score = json.loads((out / "report.json").read_text())["students"]["ridge"]["test"]["f1"]
    assert f"f1 {score:.3f}" in capsys.readouterr().out
    assert len(calls) == 2


def test_what_is_in_the_cache_needs_no_weights(write, monkeypatch):
    path, _ = write()
    run(path, "--stage", "student")
    monkeypatch.setattr(task_models, "load_task_model", lambda *a, **k: pytest.fail("it loaded"))
    run(path, "--stage", "student")


@pytest.mark.parametrize("damage", ["changed", "absent"])
def test_a_damaged_stage_is_named_and_made_again(write, capsys, damage):
    path, out = write(scratch=False, student={"training": {"max_steps": 4}})
    job = quiet_job(path)
    module = module_of(job)
    file = module / task_models.ADAPTER / "adapter_model.safetensors"
    content = file.read_bytes()
    if damage == "changed":
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    else:
        file.unlink()
    run(path)
    told = "".join(capsys.readouterr().out.split())  # a long path is broken anywhere
    assert f"{module}isdamaged(adapter/adapter_model.safetensors);itismadeagain" in told
    assert file.read_bytes() == content
    assert out.exists()


def test_a_failed_run_leaves_nothing_but_its_stages(write, monkeypatch, capsys):
    path, out = write(student={"training": {"max_steps": 5}})

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(jobs_job, "write_json", full)
    assert "No space left on device" in refused(capsys, path)
    assert not out.exists()
    assert list(out.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    "transfer",
    [
        {"layers": "mean", "method": "truncate"},
        {"method": "lsa", "preset": "reference"},
        {"layers": "cka", "method": "procrustes", "head": "transport"},
        {"method": "random_matched"},
        {
            "method": "ridge",
            "refine": {"training": {"max_steps": 4, "use_cpu": True}, "hidden_weight": 0.5},
        },
        {
            "method": "fresh",
            "refine": {"training": {"max_steps": 4, "use_cpu": True, "hub_token": "hf_secret"}},
        },
        {"method": "fresh", "head": "transport"},
    ],
    ids=lambda transfer: "-".join(str(v) for v in transfer.values() if isinstance(v, str)),
)
def test_other_ways_to_move_a_lora(write, transfer):
    path, out = write(transfer=transfer, scratch=False)
    run(path)
    report = json.loads((out / "report.json").read_text())
    assert list(report["students"]) == [transfer["method"]]
    provenance = out / "module" / "transfer.json"
    if "refine" in transfer:
        assert json.loads(provenance.read_text())["refine"]["training"]["max_steps"] == 4
    assert not any("hf_secret" in file.read_text() for file in out.rglob("*.json"))


def test_what_the_maps_lose_of_an_update_is_said(write, material, capsys):
    """The same width on both sides: what is lost is lost where the maps are measured."""
    peft = {"target_modules": ["intermediate.dense"]}
    changes = {
        "teacher": {"peft": peft},
        "student": {"path": str(material / "same")},
        "scratch": False,
    }
    path, out = write(**changes)
    run(path)
    assert "the write map keeps" not in capsys.readouterr().out
    whole = json.loads((out / "module" / "transfer.json").read_text())["kept"]
    path, _ = write(**changes, overwrite=True, transfer={"measured_at": {}})
    run(path)
    assert "ffn_up: the write map keeps" in capsys.readouterr().out
    kept = json.loads((out / "module" / "transfer.json").read_text())["kept"]
    assert [(row["student"], row["place"]) for row in kept] == [(0, "ffn_up"), (1, "ffn_up")]
    for row, other in zip(whole, kept, strict=True):
        assert row["kept"] > 0.95
        assert other["kept"] < 0.9


def _head_of(folder):
    tensors = load_file(folder / task_models.ADAPTER / "adapter_model.safetensors")
    return {name: tensor for name, tensor in tensors.items() if "classifier" in name}


def test_the_head_is_the_same_whatever_the_module_is(write):
    heads = []
    for transfer in (
        {"method": "fresh", "head": "transport"},
        {"method": "truncate", "head": "transport", "head_method": "ridge"},
        {"method": "ridge", "head": "transport"},
        {"method": "ridge", "head": "fresh"},
    ):
        path, _ = write(transfer=transfer)
        job = quiet_job(path)
        heads.append(_head_of(module_of(job)))
    fresh, copied, mapped, unmoved = heads
    assert set(fresh) == {f"base_model.model.classifier.{name}" for name in ("weight", "bias")}
    for other in (copied, mapped):
        assert {name: tensor.tolist() for name, tensor in other.items()} == {
            name: tensor.tolist() for name, tensor in fresh.items()
        }
    assert any(not torch.equal(unmoved[name], fresh[name]) for name in fresh)


def test_unlabelled_texts_are_those_nobody_has_labels_of(write):
    path, _ = write(
        teacher={"train_fraction": 0.4},
        task={"train_fraction": 0.6},
        transfer={"texts": "unlabelled", "statistics": {"examples": 20, "batch_size": 8}},
    )
    job = quiet_job(path)
    examples, texts = job.graph.examples, job.graph.texts.texts
    every = examples.with_fraction(1.0).data
    labelled = examples.data.texts("train") + every.texts("validation") + every.texts("test")
    assert texts
    assert not {tuple(text) for text in texts} & {tuple(text) for text in labelled}
    expected = [text for text in every.texts("train") if text not in labelled]
    assert texts == expected
    assert module_of(job).is_dir()  # statistics are collected and read on those texts


def test_refinement_and_training_share_their_steps(write):
    refine = {"training": {"max_steps": 3, "use_cpu": True}}
    training = {key: value for key, value in TRAINING.items() if key != "max_steps"}
    path, _ = write(student={"total_steps": [5, 9]}, transfer={"method": "fresh", "refine": refine})
    job_text = yaml.safe_load(path.read_text())
    job_text["student"]["training"] = training
    path.write_text(yaml.safe_dump(job_text))
    job = quiet_job(path)
    refined = job.cell(job.graph.student, {"method": "fresh", "seed": "0"})
    assert job.result(job.graph.student).steps == 6
    assert [point.step for point in refined.checkpoints] == [5, 9]
    assert [step for step, _ in refined.curve][:2] == [3, 5]
    assert job.result(job.graph.scratch).steps == 9
    scratch = job.cell(job.graph.scratch, {"method": "scratch", "seed": "0"})
    assert [point.step for point in scratch.checkpoints] == [5, 9]
    assert scratch.curve[0][0] == 0


@pytest.mark.parametrize(
    "peft",
    [
        {"type": "bottleneck", "bottleneck_size": 4, "placement": "houlsby"},
        {"type": "compacter", "bottleneck_size": 4, "phm_dim": 2},
        {"type": "ia3", "target_modules": ["key", "value"], "feedforward_modules": []},
    ],
    ids=lambda peft: peft["type"],
)
def test_other_modules_move(write, material, peft):
    path, out = write(scratch=False, teacher={"peft": None})
    job = yaml.safe_load(path.read_text())
    job["teacher"]["peft"] = peft
    path.write_text(yaml.safe_dump(job))
    run(path)
    base = AutoModelForTokenClassification.from_pretrained(material / "narrow", num_labels=5)
    PeftModel.from_pretrained(base, out / "module")


def test_a_teacher_that_somebody_trained(write, tmp_path, material, capsys):
    path, out = write(scratch=False)
    run(path)
    trained = json.loads((out / "report.json").read_text())["teacher"]
    path2, _ = write(
        output_dir=str(tmp_path / "second"),
        scratch=False,
        teacher={"peft": None, "adapter": str(teacher_folder(out, tmp_path))},
    )
    run(path2)
    report = json.loads((tmp_path / "second" / "report.json").read_text())
    assert report["teacher"] == trained
    # the student's module is no module of the teacher
    message = refused(
        capsys,
        path2,
        "--set",
        f"teacher.adapter={out / 'student'}",
        "--set",
        f"output_dir={tmp_path / 'third'}",
    )
    assert f"expected a module of {material / 'teacher'}, got one of" in message
    assert not (tmp_path / "third").exists()


def test_an_adapter_for_other_labels_is_refused(write, tmp_path, capsys):
    path, out = write(scratch=False)
    adapter = tmp_path / "adapter"
    shutil.copytree(teacher_folder(out, tmp_path), adapter)
    assert json.loads((adapter / "task.json").read_text())["labels"] == list(NER_LABELS)
    path, _ = write(scratch=False, teacher={"peft": None, "adapter": str(adapter)})
    order = [NER_LABELS[0], *reversed(NER_LABELS[1:])]
    message = refused(capsys, path, "--set", f"task.labels=[{', '.join(order)}]")
    assert f"expected a module for ner with the labels {', '.join(order)}" in message
    assert f"got one for ner with {', '.join(NER_LABELS)}" in message


def teacher_folder(out, tmp_path):
    """The teacher's module, which a job keeps in the cache."""
    job = quiet_job(tmp_path / "job.yaml")
    return job.get(job.graph.teacher) / task_models.ADAPTER


GRID = {
    "slowest": ["seed"],
    "axes": {
        "pair": {"same": {}, "narrow": {}},
        "method": {
            "scratch": {"transfer": None},
            "skip": {"transfer.method": "truncate"},
            "ridge": {"transfer.method": "ridge"},
        },
        "seed": {"path": "seed", "values": [0, 1]},
    },
    "only": [{"pair": ["same"]}, {"pair": ["narrow"], "seed": ["0"]}],
}


def test_an_interrupted_grid_goes_on_and_gives_the_same_table(write, material, monkeypatch, capsys):
    axes = merged(
        GRID["axes"],
        {"pair": {name: {"student.path": str(material / name)} for name in ("same", "narrow")}},
    )
    path, out = write(grid={**GRID, "axes": axes}, student={"training": {"max_steps": 6}})
    original, trained = task_stages.train_task, []

    def stopped(*args, **kwargs):
        if len(trained) == 4:
            raise KeyboardInterrupt
        trained.append(kwargs["seed"])
        return original(*args, **kwargs)

    monkeypatch.setattr(task_stages, "train_task", stopped)
    assert main(["transfer", str(path)]) == 130
    assert "in the cache; the same command goes on" in capsys.readouterr().err
    before = read_results(out)
    assert 0 < len(before) < 9
    monkeypatch.setattr(task_stages, "train_task", original)
    run(path)
    after = read_results(out)
    assert len(after) == 9
    assert after[: len(before)] == before
    again = {name: (out / name).read_bytes() for name in ("results.csv", "curves.csv", "table.md")}
    run(path)  # everything is in the cache
    assert {name: (out / name).read_bytes() for name in again} == again
    assert (out / "scores.png").is_file()
    assert (out / "learning.png").is_file()
    # fewer cells would leave rows out
    message = refused(capsys, path, "--set", "grid.only=[{pair: [same]}]")
    assert "has results of 3 other cells, e.g. ridge narrow 0" in message
    assert {name: (out / name).read_bytes() for name in again} == again


def test_a_grid_scores_on_the_way_at_the_rate_that_validation_chose(write, material):
    training = {**TRAINING, "eval_steps": 20}
    del training["max_steps"]
    refine = {"training": {"max_steps": 2, "use_cpu": True}}
    axes = {
        "models": {"same": {}, "narrow": {}},
        "method": {
            "scratch": {"transfer": None},
            "refined": {"transfer.method": "fresh", "transfer.refine": refine},
        },
        "rate": {"path": "student.training.learning_rate", "values": [1.0e-2, 3.0e-3]},
        "seed": {"path": "seed", "values": [0]},
    }
    path, out = write(
        grid={"axes": axes, "repeats": ["models", "seed"], "choose": "rate"},
        student={"path": f"{material}/{{models}}", "total_steps": [4, 30]},
    )
    job = yaml.safe_load(path.read_text())
    job["student"]["training"] = training
    path.write_text(yaml.safe_dump(job))
    run(path)
    cells = read_results(out)
    assert len(cells) == 8
    assert all([point.step for point in cell.checkpoints] == [4, 30] for cell in cells)
    starts = {cell.labels["method"]: cell.curve[0][0] for cell in cells}
    assert starts == {"scratch": 0, "refined": 2}
    table = (out / "steps.md").read_text().splitlines()
    assert "| method | 4 steps | 30 steps |" in table
    for method in starts:
        row = next(line for line in table if line.startswith(f"| {method} |"))
        for place in (0, 1):
            by_rate = {}
            for cell in cells:
                if cell.labels["method"] == method:
                    by_rate.setdefault(cell.labels["rate"], []).append(cell.checkpoints[place])
            rate, points = max(
                by_rate.items(), key=lambda item: fmean(point.validation for point in item[1])
            )
            mean = fmean(point.test for point in points)
            entry = row.split(" | ")[1 + place]
            assert entry.startswith(f"{mean:.3f} ± ")
            assert entry.removesuffix(" |").endswith(f" (2, {rate})")


def test_a_teacher_that_diverges_is_trained_once(write, material, monkeypatch, capsys):
    axes = {"method": GRID["axes"]["method"], "seed": {"path": "seed", "values": [0, 1]}}
    path, out = write(grid={"axes": axes}, teacher={"training": {"learning_rate": 1.0e-3}})
    trained = []

    def diverging(*args, **kwargs):
        trained.append(kwargs["where"])
        raise NonFiniteError("step 3: the loss is nan")

    monkeypatch.setattr(task_stages, "train_task", diverging)
    run(path)
    assert trained == ["teacher.training"]
    assert capsys.readouterr().out.count("left out, step 3: the loss is nan") == 6
    assert not (out / "results.csv").exists()


def test_what_cannot_work_is_told_before_any_work(write, capsys, monkeypatch):
    monkeypatch.setattr(task_stages, "train_task", lambda *a, **k: pytest.fail("it trained"))
    path, _ = write()
    for change, expected in {
        "transfer.method=lsq": "transfer.method: ",
        "task.kind=ne": "task.kind: ",
        "teacher.peft.rank=4": "teacher.peft.rank: unknown key",
        "student.training.max_step=3": "training.max_step: unknown key",
        "teacher.path=./nowhere": "./nowhere",
        "student.path=./nowhere": "./nowhere",
        "task.labels=[O, B-LOC, I-LOC]": "B-PER",
    }.items():
        assert expected in refused(capsys, path, "--set", change), change


def test_a_target_that_is_no_linear_of_a_block_is_refused(write, capsys):
    path, out = write(
        scratch=False, teacher={"peft": {"target_modules": ["query", "word_embeddings"]}}
    )
    assert "word_embeddings" in refused(capsys, path)
    assert not out.exists()


def test_the_output_of_another_job_is_not_overwritten(write, capsys):
    path, out = write()
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    assert "is no result of a job" in refused(capsys, path)
    assert (out / "thesis.txt").is_file()


def test_several_processes_are_refused(write, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    path, _ = write()
    assert "expected one process, got 2" in refused(capsys, path)

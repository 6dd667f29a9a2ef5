"""Which stages of a transfer an option changes, and which several jobs share."""

import pytest

from modxfer_fast.cli import transfer as command
from modxfer_fast.config.grid import load_transfer
from modxfer_fast.jobs.store import NotMade, Store
from modxfer_fast.jobs.transfer.job import TransferJob
from modxfer_fast.report import JobConsole
from tests.cli.conftest import job_file, ner_task
from tests.task_inputs import save_berts, sentences, write_conllu

TRAINING = {"max_steps": 2, "per_device_train_batch_size": 8, "use_cpu": True}
LORA = {"type": "lora", "r": 2, "lora_alpha": 4, "target_modules": ["query", "value"]}
MOVED = ("statistics", "maps", "module", "student")
ALL = ("teacher", *MOVED, "scratch")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("graph")
    write_conllu(folder / "train.conllu", sentences(60))
    save_berts(folder, teacher={"num_layers": 2}, student={"num_layers": 1, "hidden_size": 32})
    return folder


@pytest.fixture(scope="module")
def job_of(folder):
    base = {
        "task": ner_task(folder),
        "teacher": {"path": str(folder / "teacher"), "peft": LORA, "training": dict(TRAINING)},
        "student": {"path": str(folder / "student"), "training": dict(TRAINING)},
        "transfer": {"method": "ridge", "statistics": {"examples": 20, "batch_size": 8}},
    }

    def job_of(store, *overrides, **changes):
        path, _ = job_file(folder, base, changes)
        return TransferJob(load_transfer(path, overrides), JobConsole(is_main=False), store)

    return job_of


@pytest.fixture(scope="module")
def store(folder):
    return Store(folder / "cache")


def fingerprints(job):
    stages = {name: getattr(job.graph, name) for name in ALL}
    return {name: stage and stage.fingerprint for name, stage in stages.items()}


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("seed=1", ("module", "student", "scratch")),
        ("student.training.max_steps=3", ("student", "scratch")),
        ("student.fused_lora=false", ("student", "scratch")),
        ("student.dtype=float32", (*MOVED, "scratch")),
        ("teacher.seed=1", ("teacher", "module", "student")),
        ("teacher.training.max_steps=3", ("teacher", "module", "student")),
        ("teacher.peft.r=3", ("teacher", "module", "student", "scratch")),
        ("teacher.peft.target_modules=[query]", ALL),
        ("transfer.statistics.examples=30", MOVED),
        ("transfer.statistics.module_active=true", MOVED),
        ("transfer.layers=skip_last", MOVED),
        ("transfer.method=procrustes", ("maps", "module", "student")),
        ("transfer.head=transport", MOVED),
        ("transfer.refine={training: {max_steps: 2, use_cpu: true}}", ("module", "student")),
        ("task.train_fraction=0.5", ("student", "scratch")),
        ("output_dir=elsewhere", ()),
    ],
)
def test_an_option_changes_what_depends_on_it_and_nothing_else(job_of, store, override, changed):
    before = fingerprints(job_of(store))
    after = fingerprints(job_of(store, override))
    assert {name for name in ALL if before[name] != after[name]} == set(changed)


def test_where_a_model_lies_changes_nothing(job_of, store, folder):
    (folder / "moved").mkdir(exist_ok=True)
    for file in (folder / "student").iterdir():
        (folder / "moved" / file.name).write_bytes(file.read_bytes())
    moved = job_of(store, f"student.path={folder / 'moved'}")
    assert fingerprints(moved) == fingerprints(job_of(store))


def test_a_plan_tells_what_is_known_before_the_teacher_is_trained(job_of, tmp_path):
    store = Store(tmp_path)
    plan = job_of(store).plan()
    assert plan["teacher"] == "to run"
    assert plan["statistics"] == plan["student"] == "to run after teacher"
    assert not list(tmp_path.iterdir())
    job = job_of(store)
    job.get(job.graph.teacher)
    plan = job_of(store).plan()
    assert plan["teacher"] == "in the cache"
    assert {plan[name] for name in MOVED} == {"to run"}
    with pytest.raises(NotMade, match="statistics: expected a result in the cache"):
        job_of(Store(tmp_path, builds=False)).run(until="statistics")


def test_the_command_line_asks_for_the_stages_of_a_job(job_of, store):
    assert tuple(job_of(store).stages()) == command.STAGES

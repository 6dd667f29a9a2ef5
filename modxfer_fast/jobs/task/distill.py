"""One `modxfer distill` job with `kind: task`: teacher, students, report.

Teacher and students are stages in the cache of `modxfer transfer`, so that an interrupted job goes
on where it was, and a teacher serves many jobs.
"""

import shutil
import statistics
import time
from functools import cached_property
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from modxfer_fast.config import dump_config
from modxfer_fast.config.task_distill import TaskDistillConfig
from modxfer_fast.data.tasks import PRIMARY_METRIC, TaskData
from modxfer_fast.engine.tasks.distillation import distil_task
from modxfer_fast.engine.tasks.trainer import check_task_training, evaluate_task
from modxfer_fast.files import new_folder, read_json, write_json, write_text
from modxfer_fast.jobs.cache import Stages
from modxfer_fast.jobs.distill.continuation import changes
from modxfer_fast.jobs.environment import quieten_libraries
from modxfer_fast.jobs.output import CONFIG_FILE, REPORT_FILE, check_output
from modxfer_fast.jobs.ranks import single_process
from modxfer_fast.jobs.task.models import (
    JobModel,
    device_of,
    examples,
    examples_digest,
    task_collator,
)
from modxfer_fast.jobs.task.stages import (
    RESULT,
    TaskTeacher,
    check_teacher,
    report_head,
    split_steps,
    train_stage,
)
from modxfer_fast.jobs.threads import settle_threads
from modxfer_fast.models import patch_peft_model
from modxfer_fast.models.task import apply_task_peft, check_task_peft
from modxfer_fast.report import METRIC_NAMES, ConsoleCallback, JobConsole

CE_ONLY, DISTILLED = "ce_only", "distilled"
_TITLES = {CE_ONLY: "student, labels alone", DISTILLED: "student, distilled"}


def run_task_distillation(config: TaskDistillConfig, *, resume: bool = False) -> dict[str, Any]:
    """Run a job; its output folder appears when everything is in it.

    Args:
        resume: leave a finished job as it is. Another goes on where it was in any case.
    Returns:
        What `report.json` holds.
    Raises:
        UserError: anything in the configuration that cannot work.
    """
    single_process("modxfer distill with kind: task")
    quieten_libraries()
    output = Path(config.output_dir).expanduser().absolute()
    console = JobConsole(is_main=True)
    if resume and (output / REPORT_FILE).is_file() and not changes(output / CONFIG_FILE, config):
        console.say(f"finished already: {output}")
        return read_json(output / REPORT_FILE)
    check_output(output, config.overwrite)
    job = TaskDistillJob(config, console)
    job.check()
    start = time.perf_counter()
    settle_threads(console.say)
    names = [CE_ONLY, DISTILLED] if config.compare.ce_only else [DISTILLED]
    folders = {(name, seed): job.student(name, seed) for seed in config.seeds for name in names}
    scores = {
        name: {seed: read_json(folders[name, seed] / RESULT)["test"] for seed in config.seeds}
        for name in names
    }
    report = {
        **report_head(config, job.data, job.teacher.score),
        "students": scores,
        "seconds": time.perf_counter() - start,
    }
    check_output(output, config.overwrite)  # another job may have been faster
    with new_folder(output) as folder:
        write_text(folder / CONFIG_FILE, dump_config(config))
        write_json(folder / REPORT_FILE, report)
        for (name, seed), trained in folders.items():
            if name == DISTILLED:
                shutil.copytree(JobModel.trained_in(trained), folder / f"seed-{seed}")
    rows = [["teacher", f"{job.teacher.score:.3f}", ""]]
    for name in names:
        values = [score[job.metric] for score in scores[name].values()]
        deviation = f"{statistics.stdev(values):.3f}" if len(values) > 1 else ""
        rows.append([_TITLES[name], f"{statistics.fmean(values):.3f}", deviation])
    title = f"{METRIC_NAMES[job.metric]} on test, seeds {', '.join(map(str, config.seeds))}"
    console.table(title, ["model", "mean", "deviation"], rows)
    console.say(f"{report['seconds']:.0f} s; report and distilled students in {output}")
    return report


class TaskDistillJob:
    """The stages of one job."""

    def __init__(self, config: TaskDistillConfig, console: JobConsole) -> None:
        self.config = config
        self.stages = Stages(console)
        self.metric = PRIMARY_METRIC[config.task.kind]

    def check(self) -> None:
        """See every mistake in the sections that belong to a library before any work begins."""
        config = self.config
        check_teacher(config.teacher)
        check_task_training(split_steps(config.training)[0], "training")
        if config.student.peft is not None:
            check_task_peft(config.student.peft, "student.peft")

    @cached_property
    def data(self) -> TaskData:
        return examples(self.config.task)

    @cached_property
    def teacher(self) -> TaskTeacher:
        section = self.config.teacher
        return TaskTeacher(self._model(section, section.seed), self.config.task, self.stages)

    def student(self, name: str, seed: int) -> Path:
        """Folder with a student that was trained on labels alone, or distilled, and its scores."""
        config, side = self.config, self._model(self.config.student, seed)
        facts = {
            "way": name,
            "student": side.identity,
            "peft": config.student.peft,
            "fused_lora": config.student.fuses_lora,
            "task": examples_digest(config.task),
            "max_length": config.task.max_length,
            "training": config.training,
            "seed": seed,
        }
        if name == CE_ONLY:
            return self.stages.get("student", facts, lambda folder: self._train(side, folder))
        facts |= {"teacher": self.teacher.folder.name, "loss": config.loss.model_dump()}
        return self.stages.get("distilled", facts, lambda folder: self._distil(side, folder))

    def _train(self, side: JobModel, folder: Path) -> None:
        model, training = self._start(side), self.config.training
        train_stage(model, side, self.data, training, folder, self.stages, "training")

    def _distil(self, side: JobModel, folder: Path) -> None:
        config, model = self.config, self._start(side)
        training, _ = split_steps(config.training)
        log = distil_task(
            model,
            self.teacher.load(),
            self.data.train,
            task_collator(side, self.teacher.model, config.task.max_length),
            training,
            seed=side.seed,
            output_dir=folder / "checkpoints",
            callbacks=[ConsoleCallback(self.stages.console)],
            **config.loss.model_dump(),
        )
        side.save(model, folder)
        scores = {
            split: evaluate_task(model, side.tokenizer, self.data, split=split, args=training)
            for split in ("validation", "test")
        }
        write_json(folder / RESULT, {**scores, "log": log})
        self.stages.console.say(f"{self.metric} {scores['test'][self.metric]:.3f} on test")

    def _start(self, side: JobModel) -> PreTrainedModel | PeftModel:
        """The student before any training, the same for both ways."""
        section, model = self.config.student, side.load()
        if section.peft is None:
            return model
        model = apply_task_peft(
            model, section.peft, side.kind, seed=side.seed, where="student.peft"
        )
        if section.fuses_lora:
            for line in str(patch_peft_model(model)).splitlines():
                self.stages.console.say(line)
        return model

    def _model(self, section, seed: int) -> JobModel:
        device = device_of(self.config.training)
        return JobModel(section, self.config.task.kind, self.data.labels, seed, device)

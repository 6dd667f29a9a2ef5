"""One `modxfer transfer` job: its stages, and the folder with module, student, report, picture."""

import shutil
from functools import cached_property
from pathlib import Path
from typing import Any

from modxfer_fast.config.grid import SCRATCH
from modxfer_fast.config.transfer import TransferConfig
from modxfer_fast.data.tasks import PRIMARY_METRIC
from modxfer_fast.engine.tasks.distillation import check_distillation
from modxfer_fast.engine.tasks.result import TaskResult
from modxfer_fast.engine.tasks.trainer import check_task_training, evaluate_task
from modxfer_fast.files import read_json
from modxfer_fast.jobs.job import Job
from modxfer_fast.jobs.stage import Stage
from modxfer_fast.jobs.task.models import ADAPTER
from modxfer_fast.jobs.task.stages import RESULT, check_teacher, score_of, split_steps
from modxfer_fast.jobs.transfer.builds import (
    load_maps,
    load_statistics,
    read_provenance,
    verify_module,
)
from modxfer_fast.jobs.transfer.graph import TransferGraph
from modxfer_fast.report import METRIC_NAMES
from modxfer_fast.report.transfer_plots import plot_learning
from modxfer_fast.report.transfer_table import CellResult, Checkpoint, Group, group_results
from modxfer_fast.transfer.updates import share_kept


class TransferJob(Job):
    """A teacher's module, moved to a student that trains on from there, beside one from scratch."""

    command = "modxfer transfer"
    config: TransferConfig

    @cached_property
    def graph(self) -> TransferGraph:
        return TransferGraph(self.config, self.get)

    def stages(self):
        graph = self.graph
        return {
            "teacher": lambda: graph.teacher,
            "statistics": lambda: graph.statistics,
            "maps": lambda: graph.maps,
            "module": lambda: graph.module,
            "verify": lambda: graph.module,
            "student": lambda: graph.student,
            "evaluate": lambda: graph.student,
        }

    def inspect(self, name: str, folder: Path) -> None:
        graph = self.graph
        if name == "verify":
            verify_module(graph.student_model, folder, self.console)
        elif name == "evaluate":
            scores = evaluate_task(
                graph.student_model.load_with(folder / ADAPTER),
                graph.student_model.tokenizer,
                graph.examples.data,
                args=self.config.student.training,
            )
            self.console.say("test: " + ", ".join(f"{k} {v:.3f}" for k, v in scores.items()))

    def check(self) -> None:
        config = self.config
        check_teacher(config.teacher)
        check_task_training(split_steps(config.student.training)[0], "student.training")
        if config.transfer is not None and config.transfer.refine is not None:
            check_distillation(config.transfer.refine.training, "transfer.refine.training")

    # ---- what came out ----

    @property
    def teacher_score(self) -> float:
        return score_of(self.get(self.graph.teacher), self.config.task.kind)

    @cached_property
    def students(self) -> dict[str, Stage]:
        """What the job asks for, by method."""
        section, students = self.config.transfer, {}
        if self.config.scratch or section is None:
            students[SCRATCH] = self.graph.scratch
        if section is not None:
            students[section.method] = self.graph.student
        return students

    def result(self, student: Stage) -> TaskResult:
        """The scores of a student, which is trained unless it was before."""
        return TaskResult.from_dict(read_json(self.get(student) / RESULT))

    def cell(self, student: Stage, labels: dict[str, str]) -> CellResult:
        """The figures of one student for a table; the steps of its refinement count as its own."""
        result, module = self.result(student), student.inputs.get("module")
        before = self.config.steps_before(scratch=module is None)
        return CellResult(
            labels,
            teacher=self.teacher_score,
            initial=result.initial,
            score=result.test[result.metric],
            seconds=result.seconds,
            curve=tuple(
                (before + int(point["step"]), point[result.metric]) for point in result.history
            ),
            checkpoints=tuple(
                Checkpoint(before + int(point["step"]), point["validation"], point["test"])
                for point in result.checkpoints
            ),
            kept=None if module is None else _kept(self.get(module)),
        )

    @cached_property
    def _groups(self) -> list[Group]:
        seed = str(self.config.seed)
        cells = [self.cell(run, {"method": m, "seed": seed}) for m, run in self.students.items()]
        return group_results(cells, SCRATCH)

    def report(self) -> dict[str, Any]:
        students = self.students
        report = {
            "task": self.graph.examples.data.facts(),
            "metric": PRIMARY_METRIC[self.config.task.kind],
            "teacher": self.teacher_score,
            "students": {m: self.result(student).to_dict() for m, student in students.items()},
        }
        if self.config.transfer is not None:
            report["transfer"] = self._transfer_facts()
        return report

    def _transfer_facts(self) -> dict[str, Any]:
        graph = self.graph
        facts: dict[str, Any] = {}
        if graph.maps is not None:
            facts["layers"] = graph.layer_map.facts()
        if graph.statistics is not None:
            facts["statistics"] = load_statistics(self.get(graph.statistics)).facts
        if graph.maps is not None:
            facts["fits"] = load_maps(self.get(graph.maps)).fits()
        provenance = read_provenance(self.get(graph.module) / ADAPTER)
        return facts if provenance is None else {**facts, "provenance": provenance}

    def write(self, folder: Path, report: dict[str, Any]) -> None:
        plot_learning(self._groups, SCRATCH, METRIC_NAMES[report["metric"]], folder / "curves.png")
        for method, student in self.students.items():
            name = SCRATCH if method == SCRATCH else "student"
            shutil.copytree(self.get(student) / ADAPTER, folder / name)
        if self.config.transfer is not None:
            shutil.copytree(self.get(self.graph.module) / ADAPTER, folder / "module")

    def summarise(self, report: dict[str, Any], output: Path) -> None:
        (group,) = self._groups
        rows = [["teacher", report["teacher"], None, None, None]]
        for method in group.methods:
            name, gap, steps = method.method, method.gap_recovered, method.steps_to_scratch
            shown = ("" if name == SCRATCH else gap), ("–" if steps is None else steps)
            rows.append([f"student, {name}", method.mean, method.initials[0], *shown])
        columns = [
            ("model", ""),
            ("test", ".3f"),
            ("validation before", ".3f"),
            ("gap recovered", ".0%"),
            ("steps to scratch's last", ".0f"),
        ]
        title = f"{METRIC_NAMES[report['metric']]}, seed {self.config.seed}"
        self.console.table(title, columns, rows)
        seconds = report["seconds"]
        self.console.say(f"{seconds:.0f} s; module, students, report and curves in {output}")


def _kept(module: Path) -> float | None:
    """Of the updates that a moved module had in the teacher, None of a fresh one."""
    provenance = read_provenance(module / ADAPTER)
    return None if provenance is None else share_kept(provenance.get("kept", ()))

"""One transfer job from its stages to its output folder: module, student, report, picture."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

from modxfer_fast.config import dump_config
from modxfer_fast.config.grid import SCRATCH
from modxfer_fast.config.transfer import TransferConfig
from modxfer_fast.files import new_folder, write_json, write_text
from modxfer_fast.jobs.environment import quieten_libraries
from modxfer_fast.jobs.output import CONFIG_FILE, REPORT_FILE, check_output
from modxfer_fast.jobs.ranks import single_process
from modxfer_fast.jobs.task.models import ADAPTER
from modxfer_fast.jobs.task.stages import report_head
from modxfer_fast.jobs.threads import settle_threads
from modxfer_fast.jobs.transfer.job import CONTENT, StudentRun, TransferJob
from modxfer_fast.report import METRIC_NAMES, JobConsole
from modxfer_fast.report.transfer_plots import plot_learning
from modxfer_fast.report.transfer_table import CellResult, Checkpoint, group_results
from modxfer_fast.transfer import PROVENANCE, Maps, Statistics
from modxfer_fast.transfer.kept import share_kept


def run_transfer(config: TransferConfig, *, until: str | None = None) -> dict[str, Any] | None:
    """Run a job; its output folder appears when everything is in it.

    What stages leave is in the cache, so that an interrupted run goes on when it is started again.

    Args:
        until: the last stage to run; no output folder is then written.
    Returns:
        What `report.json` holds, None with `until`.
    Raises:
        UserError: anything in the configuration that cannot work.
    """
    single_process("modxfer transfer")
    quieten_libraries()
    output = Path(config.output_dir).expanduser().absolute()
    if until is None:
        check_output(output, config.overwrite)
    console = JobConsole(is_main=True)
    job = TransferJob(config, console)
    job.check()
    start = time.perf_counter()
    settle_threads(console.say)
    if until is not None:
        result = getattr(job, until)
        folder = result.folder if isinstance(result, StudentRun) else result
        console.say(f"{until}: {folder or 'not needed by this method'}")
        return None
    runs = _run_students(job)
    report = {
        **report_head(config, job.data, job.teacher_score),
        "students": {name: run.result.to_dict() for name, run in runs.items()},
    }
    if config.transfer is not None:
        report["transfer"] = _transfer_facts(job)
    report["seconds"] = time.perf_counter() - start
    cells = [cell_result(job, run, {"method": name, "seed": str(config.seed)})
             for name, run in runs.items()]  # fmt: skip
    check_output(output, config.overwrite)  # another job may have been faster
    with new_folder(output) as folder:
        write_text(folder / CONFIG_FILE, dump_config(config))
        write_json(folder / REPORT_FILE, report)
        metric = METRIC_NAMES[job.metric]
        plot_learning(group_results(cells, SCRATCH), SCRATCH, metric, folder / "curves.png")
        for name, run in runs.items():
            shutil.copytree(run.folder / ADAPTER, folder / _folder_name(name))
        if config.transfer is not None:
            shutil.copytree(job.module / ADAPTER, folder / "module")
    _print_summary(console, job, cells, output, report["seconds"])
    return report


def _run_students(job: TransferJob) -> dict[str, StudentRun]:
    runs = {}
    if job.job.scratch or job.job.transfer is None:
        runs[SCRATCH] = job.scratch
    if job.job.transfer is not None:
        runs[job.job.transfer.method] = job.student
    return runs


def _folder_name(name: str) -> str:
    return SCRATCH if name == SCRATCH else "student"


def _transfer_facts(job: TransferJob) -> dict[str, Any]:
    facts: dict[str, Any] = {"layers": job.layer_map.facts()} if job.maps is not None else {}
    if job.statistics is not None:
        facts["statistics"] = Statistics.load(job.statistics / CONTENT).facts
    if job.maps is not None:
        facts["fits"] = Maps.load(job.maps / CONTENT).fits()
    provenance = job.module / ADAPTER / PROVENANCE
    if provenance.is_file():
        facts["provenance"] = json.loads(provenance.read_text(encoding="utf-8"))
    return facts


def cell_result(job: TransferJob, run: StudentRun, labels: dict[str, str]) -> CellResult:
    """The figures of one student for the table."""
    result = run.result
    return CellResult(
        labels,
        teacher=job.teacher_score,
        initial=result.initial,
        score=result.test[result.metric],
        seconds=result.seconds,
        curve=tuple(
            (run.steps_before + int(point["step"]), point[result.metric])
            for point in result.history
        ),
        checkpoints=tuple(
            Checkpoint(run.steps_before + int(point["step"]), point["validation"], point["test"])
            for point in result.checkpoints
        ),
        kept=None if run.module is None else _kept(run.module),
    )


def _kept(module: Path) -> float | None:
    """Of the updates that a moved module had in the teacher, None of a fresh one."""
    provenance = module / ADAPTER / PROVENANCE
    if not provenance.is_file():
        return None
    return share_kept(json.loads(provenance.read_text(encoding="utf-8")).get("kept", ()))


def _print_summary(
    console: JobConsole, job: TransferJob, cells: list[CellResult], output: Path, seconds: float
) -> None:
    (group,) = group_results(cells, SCRATCH)
    rows = [["teacher", f"{job.teacher_score:.3f}", "", "", ""]]
    for method in group.methods:
        gap, steps = method.gap_recovered, method.steps_to_scratch
        rows.append(
            [
                f"student, {method.method}",
                f"{method.mean:.3f}",
                f"{method.initials[0]:.3f}",
                "" if gap is None or method.method == SCRATCH else f"{gap:.0%}",
                "–" if steps is None else f"{steps:.0f}",
            ]
        )
    columns = ["model", "test", "validation before", "gap recovered", "steps to scratch's last"]
    console.table(f"{METRIC_NAMES[job.metric]}, seed {job.job.seed}", columns, rows)
    console.say(f"{seconds:.0f} s; module, students, report and curves in {output}")

"""A job: stages on one store, and what every command does around them, once."""

import logging
import os
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import datasets
import torch
import transformers

from modxfer_fast import __version__
from modxfer_fast.config import ConfigError, as_dict, dump_config
from modxfer_fast.files import new_folder, read_json, write_json, write_text
from modxfer_fast.jobs.output import CONFIG_FILE, REPORT_FILE, changes, check_output
from modxfer_fast.jobs.ranks import is_main, single_process, world_size
from modxfer_fast.jobs.stage import Stage
from modxfer_fast.jobs.store import NotMade, Store
from modxfer_fast.jobs.threads import settle_threads
from modxfer_fast.measure.environment import describe
from modxfer_fast.report import JobConsole

CACHED, TO_RUN = "in the cache", "to run"


class Job:
    """What a command does, as stages; a kind of job says the rest.

    Args:
        config: sections of a whole job file, with `output_dir` and `overwrite`.
        console: told which stages run and which are there already.
        store: where they are; jobs of one grid share it.
    Attributes:
        command: as a person calls it.
    """

    command: ClassVar[str]

    def __init__(
        self, config: Any, console: JobConsole | None = None, store: Store | None = None
    ) -> None:
        self.config = config
        self.console = console or JobConsole(is_main=is_main())
        self.store = store or Store()

    # ---- what a kind of job says ----

    def check(self) -> None:
        """See every mistake in the sections that belong to a library before any work begins.

        Raises:
            ConfigError, ModelError: naming the place.
        """

    def stages(self) -> Mapping[str, Callable[[], Stage | None]]:
        """By the names under which a person asks for them, in the order in which they run.

        A stage is described only when it is asked for: what it is may depend on what an earlier
        one left, which is then made first. None where this job has no use for it.
        """
        raise NotImplementedError

    def inspect(self, name: str, folder: Path) -> None:
        """What is done with the folder of a stage each time a person asks for it by this name."""

    def report(self) -> dict[str, Any]:
        """Runs the stages; what their report says, but for its head."""
        raise NotImplementedError

    def write(self, folder: Path, report: dict[str, Any]) -> None:
        """Fill the output folder, which has the configuration and the report already."""

    def summarise(self, report: dict[str, Any], output: Path) -> None:
        """Tell a person what came out."""

    # ---- what all of them do ----

    def get(self, stage: Stage) -> Path:
        """The folder of a stage, which is made where it is not there."""
        return self.store.get(stage, self.console)

    def plan(self) -> dict[str, str]:
        """What `run` would do: {stage: "in the cache", "to run", or "to run after ..."}.

        Nothing runs. What follows from results that are not there is not known before they are.
        """
        looking = type(self)(
            self.config, JobConsole(is_main=False), Store(self.store.root, builds=False)
        )
        plan: dict[str, str] = {}
        for name, stage_of in looking.stages().items():
            try:
                stage = stage_of()
            except NotMade as missing:
                plan[name] = f"{TO_RUN} after {missing.stage.name}"
                continue
            if stage is not None:
                there = looking.store.has(stage, looking.console.say)
                plan[name] = CACHED if there else TO_RUN
        return plan

    def run(self, *, until: str | None = None, resume: bool = False) -> dict[str, Any] | None:
        """Run the job; its output folder appears when everything is in it.

        What stages leave is in the store, so that an interrupted run goes on when it is started
        again.

        Args:
            until: the last stage to run; no output folder is then written.
            resume: leave a finished job as it is. Another goes on where it was in any case.
        Returns:
            What `report.json` holds, None with `until`.
        Raises:
            UserError: anything in the configuration that cannot work.
        """
        single_process(self.command)
        quieten_libraries()
        config, console = self.config, self.console
        output = Path(config.output_dir).expanduser().absolute()
        done = output / REPORT_FILE
        if resume and done.is_file() and not changes(output / CONFIG_FILE, config):
            console.say(f"finished already: {output}")
            return read_json(done)
        if until is None:
            check_output(output, config.overwrite)
        self.check()
        if until is not None:
            settle_threads(console.say)
            self._run_until(until)
            return None
        report = self.whole_report()
        check_output(output, config.overwrite)  # another job may have been faster
        with new_folder(output) as folder:
            write_text(folder / CONFIG_FILE, dump_config(config))
            write_json(folder / REPORT_FILE, report)
            self.write(folder, report)
        self.summarise(report, output)
        return report

    def whole_report(self) -> dict[str, Any]:
        """Runs the stages; what `report.json` holds."""
        start = time.perf_counter()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        settle_threads(self.console.say)
        report = {
            "modxfer_fast": __version__,
            "environment": {**describe(device), "processes": world_size()},
            "config": as_dict(self.config),
            **self.report(),
        }
        report["seconds"] = time.perf_counter() - start
        return report

    def _run_until(self, name: str) -> None:
        stages = self.stages()
        if name not in stages:
            raise ConfigError(f"--stage: expected one of {', '.join(stages)}, got {name}")
        stage = stages[name]()
        if stage is None:
            self.console.say(f"{name}: not needed by this method")
            return
        folder = self.get(stage)
        self.inspect(name, folder)
        self.console.say(f"{name}: {folder}")


def quieten_libraries() -> None:
    """The console is ours; libraries speak up only when something is wrong."""
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed warns when it has to find out
    warnings.filterwarnings("ignore", category=FutureWarning)
    # PEFT looks for an adapter's base where the output will be, while it is still being made
    warnings.filterwarnings("ignore", "Could not find a config file in")

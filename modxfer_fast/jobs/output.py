"""Where a job works: `<output_dir>.partial`, renamed to `<output_dir>` when everything is there."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from modxfer_fast import files
from modxfer_fast.config import ConfigError, JobConfig, dump_config
from modxfer_fast.config.model import SERVED_WAYS
from modxfer_fast.config.on_policy import VLLM_WAYS
from modxfer_fast.jobs.ranks import on_main, world_size
from modxfer_fast.jobs.stage import HOUSEKEEPING, Stage
from modxfer_fast.jobs.store import Store

CONFIG_FILE = "config.yaml"
REPORT_FILE = "report.json"
CHECKPOINTS = "checkpoints"
DATA_FILE, PROCESSES_FILE = "data.txt", "processes.txt"  # of the start, in that folder
_STAGES = "stages"
_LOCK_FILE = "job.lock"
# nothing that is computed depends on them
_IMMATERIAL = (
    *("output_dir", "overwrite"),
    *(f"teacher.served.{key}" for key in SERVED_WAYS),
    *(f"on_policy.vllm.{key}" for key in VLLM_WAYS),
    *(f"training.{key}" for key in HOUSEKEEPING),
)
_LENGTHS = ("training.max_steps", "training.num_train_epochs")
_ABSENT = "nothing"
Changes = dict[str, tuple[Any, Any]]  # {dotted path: (before, now)}


def check_output(output: Path, overwrite: bool) -> None:
    """Raise a ConfigError where a job may not put its output."""
    if output.exists() and not (output / REPORT_FILE).is_file():
        raise ConfigError(
            f"output_dir: {output} exists and is no result of a job; name another folder"
        )
    if output.exists() and not overwrite:
        raise ConfigError(
            f"output_dir: {output} exists; set overwrite: true or name another folder"
        )


class OutputStore(Store):
    """Results of stages in the unfinished output of a job, named as in the finished one.

    A name has one result: `WorkFolder` keeps to one configuration and one set of rows, and a result
    of other models is refused. Checkpoints stay, for a run that is to train longer.
    """

    reused = "finished before the interruption"
    hint = None  # `WorkFolder.leave` says how to go on

    def __init__(self, work: Path) -> None:
        super().__init__(work / _STAGES)

    def has(self, stage: Stage, tell: Callable[[str], None]) -> bool:
        on_main(lambda: self._check_same(stage))
        return super().has(stage, tell)

    def _check_same(self, stage: Stage) -> None:
        sealed = (files.sealed_facts(self.folder(stage)) or {}).get("facts")
        if sealed is not None and sealed["options"] != stage.facts["options"]:
            raise ConfigError(
                f"--resume: {stage.name} began from other models or options than those of now; "
                f"restore them, or remove {self.root.parent} to start again"
            )

    def folder(self, stage: Stage) -> Path:
        return self.root / stage.name

    def checkpoints(self, stage: Stage, scratch: Path) -> Path:
        return self.root.with_name(CHECKPOINTS) / stage.name


class WorkFolder:
    """The unfinished output of one job, which one process at a time may have open.

    Only the main process calls `open`, `leave` and `finish`; the others may write below `path` in
    between.
    """

    def __init__(self, config: JobConfig) -> None:
        self.output = Path(config.output_dir).expanduser().absolute()
        self.path = self.output.with_name(self.output.name + ".partial")
        self._config = config
        self._lock = files.FileLock(self.path / _LOCK_FILE)
        self._replaces = config.overwrite

    def finished_report(self) -> dict[str, Any] | None:
        """The report of this very job where it is finished, else None. Every process may ask."""
        done = self.output / REPORT_FILE
        if not done.is_file() or changes(self.output / CONFIG_FILE, self._config):
            return None
        if self._config.overwrite and self._has_progress():
            return None  # it was being done once more
        return files.read_json(done)

    def open(self, *, resume: bool) -> None:
        """Create the folder, or take up the one of an interrupted run.

        Args:
            resume: go on with what is there, be it an interrupted run of the same configuration or
                an interrupted or finished one that is to train longer; start where nothing is.
        Raises:
            ConfigError: the output exists and may not be replaced; an interrupted run is in the
                way, or one of another configuration is to be resumed; or another process works
                there.
        """
        continued, self._replaces = False, self._config.overwrite
        if resume and (self.output / REPORT_FILE).is_file():
            differing = changes(self.output / CONFIG_FILE, self._config)
            continued = _is_longer(differing)
            self._replaces |= continued
            if not self._replaces:
                raise ConfigError(
                    f"--resume: the configuration differs from that of {self.output}: "
                    f"{_describe(differing)}; set overwrite: true or name another folder"
                )
        check_output(self.output, self._replaces)
        self._check_ours()
        self._acquire()
        try:
            if self._has_progress():
                self._take_up(resume=resume)
            else:
                self._begin()
                if continued:
                    self._take_checkpoints_of_output()
        except BaseException:
            self.leave()
            raise

    def _acquire(self) -> None:
        while not self._lock.holds():
            try:
                self.path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ConfigError(f"output_dir: {self.path} cannot be made ({error})") from error
            try:
                self._lock.acquire()
            except files.LockedError as error:
                raise ConfigError(
                    f"output_dir: {self.path} is in use by {error}; wait for its end or name "
                    "another folder"
                ) from None
            except FileNotFoundError:  # a job that failed early removed its folder just now
                continue

    def check_data(self, digest: str) -> None:
        """Raise a ConfigError where a run goes on with other rows than it began with.

        Args:
            digest: of the rows of now, which a run that begins keeps.
        """
        kept = self.path / CHECKPOINTS / DATA_FILE
        if kept.is_file() and kept.read_text(encoding="utf-8") != digest:
            raise ConfigError(
                f"--resume: the data are no longer those that the run in {self.path} began with; "
                "restore them, or remove the folder to start again"
            )
        kept.parent.mkdir(exist_ok=True)
        files.write_text(kept, digest)

    def processes(self) -> int:
        """How many processes the run began with, which one that begins keeps."""
        kept = self.path / CHECKPOINTS / PROCESSES_FILE
        if kept.is_file():
            return int(kept.read_text(encoding="utf-8"))
        kept.parent.mkdir(exist_ok=True)
        files.write_text(kept, str(world_size()))
        return world_size()

    def _check_ours(self) -> None:
        """Raise a ConfigError where the working folder would be inside somebody else's."""
        if not self.path.exists() or (self.path / CONFIG_FILE).is_file():
            return
        if not self.path.is_dir() or {p.name for p in self.path.iterdir()} - {_LOCK_FILE}:
            raise ConfigError(
                f"output_dir: {self.path} is in the way and is no interrupted run; remove it"
            )

    def _has_progress(self) -> bool:
        """Whether a run could go on from what is there."""
        has_results = any(self.path.glob(f"{_STAGES}/*/*/{files.MARKER}"))
        return has_results or bool(_markers(self.path))

    def _begin(self) -> None:
        for path in self.path.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != _LOCK_FILE:
                path.unlink()
        files.write_text(self.path / CONFIG_FILE, dump_config(self._config))

    def _take_up(self, *, resume: bool) -> None:
        if not resume:
            raise ConfigError(
                f"output_dir: {self.path} holds an interrupted run; continue it with --resume, or "
                "remove it to start again"
            )
        differing = changes(self.path / CONFIG_FILE, self._config)
        if differing and not _is_longer(differing):
            raise ConfigError(
                f"--resume: the configuration differs from that of {self.path}: "
                f"{_describe(differing)}"
            )
        if differing:  # what has ended goes on from its last checkpoint
            shutil.rmtree(self.path / _STAGES, ignore_errors=True)
            files.write_text(self.path / CONFIG_FILE, dump_config(self._config))
        for folder in (self.path / CHECKPOINTS).rglob("checkpoint-*"):
            if folder.is_dir() and not (folder / files.MARKER).is_file():  # half of one
                shutil.rmtree(folder)

    def _take_checkpoints_of_output(self) -> None:
        if not _markers(self.output):
            raise ConfigError(
                f"--resume: {self.output} keeps no checkpoint to go on from (training.save_strategy"
                "); without --resume and with overwrite: true all steps are trained again"
            )
        link_tree(self.output / CHECKPOINTS, self.path / CHECKPOINTS)

    def leave(self) -> str | None:
        """After a failure: let go, and remove the folder unless it holds something.

        Returns:
            How to go on, where there is something to go on from.
        """
        hint = None
        if self._has_progress():
            newest = max(_markers(self.path), key=lambda path: path.stat().st_mtime, default=None)
            whole = f" ({newest.parent.relative_to(self.path)} is whole)" if newest else ""
            hint = f"what is done stays in {self.path}{whole}; --resume goes on from there"
        left = {path.name for path in self.path.rglob("*") if path.is_file()}
        if not left - {CONFIG_FILE, DATA_FILE, PROCESSES_FILE, _LOCK_FILE}:
            # while the lock is held: whoever waits for it must not lose a folder of its own
            shutil.rmtree(self.path, ignore_errors=True)
        self._lock.release()
        return hint

    def finish(self) -> Path:
        """Put the folder in its place, instead of an older one, and return that place.

        Results of stages go last: until the folder is in its place they are what a failed run
        goes on from.

        Raises:
            ConfigError: another process took the folder or the place; what is done stays.
        """
        if not self._lock.holds():
            raise ConfigError(f"output_dir: another process replaced {self.path} in the meantime")
        try:
            check_output(self.output, self._replaces)
        except ConfigError as error:
            raise ConfigError(f"{error}; the finished run is in {self.path}") from None
        files.sync_tree(self.path)
        files.replace_folder(self.path, self.output)
        shutil.rmtree(self.output / _STAGES, ignore_errors=True)
        self._lock.release(self.output / _LOCK_FILE)
        return self.output


def _markers(folder: Path) -> list[Path]:
    return sorted((folder / CHECKPOINTS).rglob(f"checkpoint-*/{files.MARKER}"))


def link_tree(source: Path, target: Path) -> None:
    """Have the files of `source` in `target` too, instead of what is there.

    Checkpoints and models are never changed, only removed, so that two folders may share them.
    """
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, copy_function=_link_or_copy)


def _link_or_copy(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:
        return shutil.copy2(source, target)
    return target


def changes(before: Path, config: BaseModel) -> Changes:
    """How `config` differs from the one in a file; where the output goes, what it may replace and
    where a server is changes nothing.
    """
    if not before.is_file():
        return {before.name: (_ABSENT, "a job")}
    try:
        old = _flat(yaml.safe_load(before.read_text(encoding="utf-8")))
    except (yaml.YAMLError, AttributeError) as error:
        raise ConfigError(f"{before} is damaged ({error}); remove or restore it") from error
    new = _flat(yaml.safe_load(dump_config(config)))
    pairs = {key: (old.get(key, _ABSENT), new.get(key, _ABSENT)) for key in {**old, **new}}
    return {
        key: (was, now)
        for key, (was, now) in pairs.items()
        if was != now and key not in _IMMATERIAL
    }


def _is_longer(changes: Changes) -> bool:
    """Whether training goes on for more steps or epochs, and nothing else changed."""
    if len(changes) != 1:
        return False
    ((key, (was, now)),) = changes.items()
    return key in _LENGTHS and all(isinstance(n, int | float) for n in (was, now)) and now > was > 0


def _describe(changes: Changes) -> str:
    lines = [f"{key}: {now} instead of {was}" for key, (was, now) in sorted(changes.items())]
    return "; ".join(lines[:6])


def _flat(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in section.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat

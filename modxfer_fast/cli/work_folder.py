"""Where a job works: `<output_dir>.partial`, renamed to `<output_dir>` when everything is there."""

import shutil
from pathlib import Path

from modxfer_fast.config import ConfigError, JobConfig, dump_config
from modxfer_fast.report import replace_folder, write_text

CONFIG_FILE = "config.yaml"
REPORT_FILE = "report.json"


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


class WorkFolder:
    """The unfinished output of one job.

    Only the main process calls `open` and `finish`; the others may write below `path` in between.
    """

    def __init__(self, config: JobConfig) -> None:
        self.output = Path(config.output_dir).expanduser().absolute()
        self.path = self.output.with_name(self.output.name + ".partial")
        self._config = config

    def open(self, *, resume: bool) -> None:
        """Create the folder, or take up the one of an interrupted run.

        Raises:
            ConfigError: the output exists and may not be replaced, an interrupted run is in the
                way, or `resume` meets none or one with another configuration.
        """
        config = self._config
        check_output(self.output, config.overwrite)
        if resume:
            self._check_resumable()
            return
        if self.path.exists():
            if not config.overwrite:
                raise ConfigError(
                    f"output_dir: {self.path} holds an interrupted run; continue it with --resume, "
                    "or set overwrite: true"
                )
            if not (self.path / CONFIG_FILE).is_file():
                raise ConfigError(
                    f"output_dir: {self.path} is in the way and is no interrupted run; remove it"
                )
            shutil.rmtree(self.path)
        self.path.mkdir(parents=True)
        write_text(self.path / CONFIG_FILE, dump_config(config))

    def _check_resumable(self) -> None:
        kept = self.path / CONFIG_FILE
        if not kept.is_file():
            raise ConfigError(f"--resume: expected an interrupted run at {self.path}, found none")
        before, now = kept.read_text(encoding="utf-8").splitlines(), dump_config(self._config)
        changed = sorted(set(now.splitlines()) ^ set(before))
        if changed:
            raise ConfigError(
                f"--resume: the configuration differs from that of {self.path}: "
                + "; ".join(line.strip() for line in changed[:6])
            )

    def discard_if_empty(self) -> None:
        """After a failure: remove the folder unless it holds something worth resuming."""
        files = [path for path in self.path.rglob("*") if path.is_file()]
        if files == [self.path / CONFIG_FILE]:
            shutil.rmtree(self.path)

    def finish(self) -> Path:
        """Put the folder in its place, instead of an older one, and return that place."""
        replace_folder(self.path, self.output)
        return self.output

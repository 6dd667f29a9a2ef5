"""What a job tells: console, `report.json`, picture of the curves, atomic folders."""

from modxfer_fast.files import new_folder, replace_folder, write_json, write_text
from modxfer_fast.report.callback import ConsoleCallback
from modxfer_fast.report.console import JobConsole
from modxfer_fast.report.curves import STEP_LABELS, plot_curves
from modxfer_fast.report.transfer_table import METRIC_NAMES

__all__ = [
    "METRIC_NAMES",
    "STEP_LABELS",
    "ConsoleCallback",
    "JobConsole",
    "new_folder",
    "plot_curves",
    "replace_folder",
    "write_json",
    "write_text",
]

"""What a job tells: console, tables, pictures of curves and scores."""

from modxfer_fast.report.console import ConsoleCallback, JobConsole
from modxfer_fast.report.curves import STEP_LABELS, plot_curves
from modxfer_fast.report.transfer_table import METRIC_NAMES

__all__ = ["METRIC_NAMES", "STEP_LABELS", "ConsoleCallback", "JobConsole", "plot_curves"]

"""What a job runs among: libraries that talk too much, and the machine that a report names."""

import logging
import os
import warnings
from typing import Any

import datasets
import torch
import transformers

from modxfer_fast.jobs.ranks import world_size
from modxfer_fast.measure.environment import describe


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


def environment() -> dict[str, Any]:
    """Versions and hardware, for a report; described as in the header of a benchmark."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {**describe(device), "processes": world_size()}

"""A checkpoint that another number of ranks goes on from: DeepSpeed's universal form of it."""

import argparse
import contextlib
import io
import os
from pathlib import Path

from torch import Tensor, nn

_TAG = "universal"
_OF_THE_STEP = {"params", "lr", "step"}  # of a group of parameters; else it has options


def convert(checkpoint: str | Path, folder: str | Path) -> None:
    """Writes into `folder` each parameter of a ZeRO checkpoint, whole, with its moments.

    Raises:
        ValueError: no conversion is possible.
    """
    from deepspeed.checkpoint import ds_to_universal

    tag = (Path(checkpoint) / "latest").read_text().strip()
    options = argparse.Namespace(
        input_folder=os.path.join(checkpoint, tag),
        output_folder=os.path.join(folder, _TAG),
        # forks of a process with a process group and threads may hang
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    chatter = io.StringIO()
    try:
        with contextlib.redirect_stdout(chatter), contextlib.redirect_stderr(chatter):
            ds_to_universal.main(options)
    except (AssertionError, KeyError, NotImplementedError, RuntimeError) as error:
        raise ValueError(
            f"resume_from_checkpoint: {checkpoint} cannot be made a universal checkpoint, which "
            f"another number of ranks needs ({type(error).__name__}: {error}); go on with as many "
            "ranks as wrote it"
        ) from error


def load(engine: nn.Module, folder: str | Path) -> None:
    """Reads what `convert` wrote into DeepSpeed's engine, of any number of ranks. Collective."""
    optimizer = engine.optimizer.optimizer
    kept = [{key: g[key] for key in g.keys() - _OF_THE_STEP} for g in optimizer.param_groups]
    engine._config.load_universal_checkpoint = True
    try:
        engine.load_checkpoint(str(folder), load_module_strict=False)
    finally:
        engine._config.load_universal_checkpoint = False
    # stage 3 gives every group the options of the first, weight decay among them, and one tensor
    # as the step, which each group then adds to
    for group, options in zip(optimizer.param_groups, kept, strict=True):
        group.update(options)
    for state in optimizer.state.values():
        if isinstance(state.get("step"), Tensor):
            state["step"] = state["step"].clone()

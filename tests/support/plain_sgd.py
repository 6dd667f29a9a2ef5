"""Training whose weights can be computed by hand."""

from pathlib import Path

from modxfer_fast.engine import DistillConfig


def plain_sgd(folder: str | Path, **options) -> DistillConfig:
    """Arguments of SGD without momentum or clipping, its rate constant, its rows in their order."""
    return DistillConfig(
        output_dir=str(folder),
        **{
            "learning_rate": 0.5,
            "lr_scheduler_type": "constant",
            "optim": "sgd",
            "max_grad_norm": 0.0,
            "train_sampling_strategy": "sequential",
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            **options,
        },
    )

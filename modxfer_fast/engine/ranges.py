"""Numbers that TrainingArguments takes without a word and that no run can mean."""

from transformers import TrainingArguments

_LEAST = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "learning_rate": 0,
}


def check_at_least(options: TrainingArguments, bounds: dict[str, int]) -> None:
    """Raise a ValueError that names the first option below its bound."""
    for name, least in bounds.items():
        if getattr(options, name) < least:
            raise ValueError(f"{name}: expected >= {least}, got {getattr(options, name)}")


def check_ranges(options: TrainingArguments) -> None:
    """Raise a ValueError that names an option of TrainingArguments out of its range.

    A negative `max_steps` other than -1 would be taken for none, and 0 steps for a training.
    """
    check_at_least(options, _LEAST)
    if options.max_steps != -1 and options.max_steps < 1:
        raise ValueError(
            f"max_steps: expected >= 1, or -1 for num_train_epochs, got {options.max_steps}"
        )
    if options.max_steps == -1 and not options.num_train_epochs > 0:
        raise ValueError(f"num_train_epochs: expected > 0, got {options.num_train_epochs}")

"""What a head for a task answers, and what a model with one needs to be told."""

from collections.abc import Sequence

from peft import PeftModel
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from modxfer_fast.config.task import TaskKind
from modxfer_fast.errors import ModelError
from modxfer_fast.models.architecture import max_tokens


def check_head(config: PreTrainedConfig, kind: TaskKind, labels: Sequence[str], role: str) -> None:
    """Raise unless a checkpoint has no task head, or one of this kind for these labels."""
    ours, other = "ForTokenClassification", "ForSequenceClassification"
    if kind != "ner":
        ours, other = other, ours
    for name in config.architectures or ():
        if name.endswith(ours):
            check_labels(config, labels, role)
        elif name.endswith(other):
            # both heads have the same name, and the weights of one would serve as the other
            raise ModelError(
                f"{role}: expected a model without a head or one {ours}, got a {name}; save its "
                "base model alone"
            )


def label_names(config: PreTrainedConfig) -> list[str]:
    """The labels of a model's head in the order of their ids."""
    return [config.id2label[i] for i in sorted(config.id2label)]


def same_labels(one: Sequence[str], other: Sequence[str]) -> bool:
    """Whether two heads answer alike; names that transformers made up are equal to any other."""
    made_up = any(all(n == f"LABEL_{i}" for i, n in enumerate(side)) for side in (one, other))
    return len(one) == len(other) and (made_up or list(one) == list(other))


def check_labels(config: PreTrainedConfig, labels: Sequence[str], role: str) -> None:
    """Raise unless a model with a head has the labels of the task, as `same_labels` compares."""
    theirs = label_names(config)
    if same_labels(theirs, labels):
        return
    hint = "; task.labels gives their order" if sorted(theirs) == sorted(labels) else ""
    raise ModelError(
        f"{role}: expected a head for the labels of the task, {', '.join(labels)}, "
        f"got one for {', '.join(map(str, theirs))}{hint}"
    )


def check_length(model: PreTrainedModel | PeftModel, length: int) -> None:
    """Raise a ModelError unless `model` has a position for each of `length` tokens."""
    config = model.config.get_text_config()
    limit = max_tokens(config)
    if limit is not None and length > limit:
        raise ModelError(
            f"task.max_length: expected at most the {limit} tokens of {config.model_type}, "
            f"got an example of {length}"
        )


def set_pad_token(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Tell a model without one its padding token, before which a decoder's head reads."""
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id

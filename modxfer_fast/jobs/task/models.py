"""The models, tokenizers, examples and modules of jobs on a task, and what tells them apart."""

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modxfer_fast.config.model import PretrainedSection
from modxfer_fast.config.task import TaskKind, TaskSection
from modxfer_fast.data import tokenizer_digest
from modxfer_fast.data.tasks import TaskData, TaskTextCollator, load_task, load_task_tokenizer
from modxfer_fast.files import read_json, write_json
from modxfer_fast.jobs.stage import weights_of
from modxfer_fast.models import Architecture, load_adapter, load_task_model, task_skeleton
from modxfer_fast.models.task import set_pad_token
from modxfer_fast.transfer import TransferError
from modxfer_fast.transfer.attach import TASK
from modxfer_fast.transfer.modules import load_config, same_model

# Of a stage's folder: what PeftModel.from_pretrained loads, or a whole model.
ADAPTER, MODEL = "adapter", "model"


@dataclass(frozen=True)
class Examples:
    """The examples of a task section. What they are tells them, not where they come from."""

    section: TaskSection

    @property
    def data(self) -> TaskData:
        return _task_of(self.section.model_dump_json())

    @property
    def identity(self) -> dict[str, Any]:
        digest = _digest_of(self.section.model_dump_json())
        return {"digest": digest, "max_length": self.section.max_length}

    def with_fraction(self, fraction: float) -> "Examples":
        """The same with another share of the training examples."""
        return Examples(self.section.model_copy(update={"train_fraction": fraction}))


@lru_cache(maxsize=8)
def _task_of(section_json: str) -> TaskData:
    return load_task(TaskSection.model_validate_json(section_json))


@lru_cache(maxsize=32)
def _digest_of(section_json: str) -> str:
    return _task_of(section_json).digest()


@lru_cache(maxsize=8)
def _tokenizer(path: str, kind: TaskKind, revision: str | None, trust: bool):
    return load_task_tokenizer(path, kind, revision=revision, trust_remote_code=trust)


@dataclass(frozen=True)
class TaskModel:
    """The base model of one side of a job with a head for its task, and its modules.

    Attributes:
        section: of the configuration. kind, labels: of the task.
        seed: of a head that neither the checkpoint nor a module brings.
        device: where it is loaded, which changes nothing about it.
    """

    section: PretrainedSection
    kind: TaskKind
    labels: tuple[str, ...]
    seed: int
    device: torch.device

    @classmethod
    def for_task(
        cls,
        section: PretrainedSection,
        examples: Examples,
        *,
        seed: int,
        training: dict[str, Any],
    ) -> "TaskModel":
        """A model for the labels of some examples, where a training section runs."""
        kind, labels = examples.section.kind, examples.data.labels
        return cls(section, kind, labels, seed, device_of(training))

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        section = self.section
        return _tokenizer(section.path, self.kind, section.revision, section.trust_remote_code)

    @cached_property
    def weights(self) -> dict[str, Any]:
        """What tells their model from others, and how it is loaded."""
        section = self.section
        options = {"dtype": section.dtype, "attention": section.attn_implementation}
        return {**weights_of(section.path, section), **options}

    @property
    def identity(self) -> dict[str, Any]:
        return {
            "weights": self.weights,
            "kind": self.kind,
            "labels": self.labels,
            "seed": self.seed,
            "trust_remote_code": self.section.trust_remote_code,
        }

    @cached_property
    def without_seed(self) -> "TaskModel":
        """The same for a stage that reads nothing behind its blocks, and so serves every seed."""
        return self if self.seed == 0 else replace(self, seed=0)

    @cached_property
    def skeleton(self) -> PreTrainedModel:
        """The model without weights."""
        return task_skeleton(self.section, self.kind, self.labels)

    @property
    def architecture(self) -> Architecture:
        return Architecture.of(self.skeleton)

    def load(self) -> PreTrainedModel:
        model = load_task_model(self.section, self.kind, self.labels, seed=self.seed)
        set_pad_token(model, self.tokenizer)
        return model.to(self.device)

    def load_with(self, adapter: Path, *, trainable: bool = False) -> PeftModel:
        """The model with the module in a folder, by plain PEFT.

        Raises:
            TransferError: a head for other labels.
        """
        try:
            return load_adapter(self.load(), adapter, trainable=trainable)
        except RuntimeError as error:
            raise TransferError(
                f"adapter {adapter}: does not fit {self.section.path} with a head for the "
                f"{len(self.labels)} labels {', '.join(self.labels)} ({error})"
            ) from error

    @staticmethod
    def trained_in(folder: Path) -> Path | None:
        """What `save` left in a stage's folder."""
        there = (folder / name for name in (ADAPTER, MODEL))
        return next((path for path in there if path.is_dir()), None)

    def load_trained(self, folder: Path) -> PreTrainedModel | PeftModel:
        """What `save` left in a stage's folder, or where it left nothing the model as it is."""
        trained = self.trained_in(folder)
        if trained is None:
            return self.load()
        if trained.name == ADAPTER:
            return self.load_with(trained)
        section = self.section.model_copy(update={"path": str(trained), "revision": None})
        return replace(self, section=section).load()

    def save(self, model: PreTrainedModel | PeftModel, folder: Path) -> None:
        """Write `adapter` and beside it what it is for, or without PEFT `model`."""
        if not isinstance(model, PeftModel):
            model.save_pretrained(str(folder / MODEL))
            self.tokenizer.save_pretrained(str(folder / MODEL))
            return
        model.save_pretrained(str(folder / ADAPTER))
        self.note_task(folder / ADAPTER)

    def note_task(self, adapter: Path) -> None:
        """Note beside a module what it was trained for: PEFT keeps no names of labels."""
        write_json(adapter / TASK, {"kind": self.kind, "labels": list(self.labels)})

    def check_adapter(self, adapter: Path) -> None:
        """Raise a TransferError unless a folder has a module of this model for this task.

        The labels of one without a task.json are unknown; only their number is compared, when it is
        loaded.
        """
        config = load_config(adapter)
        found = config.base_model_name_or_path
        if found and not same_model(str(Path(self.section.path).expanduser()), found):
            raise TransferError(
                f"adapter {adapter}: expected a module of {self.section.path}, got one of {found}"
            )
        if not (adapter / TASK).is_file():
            return
        task = read_json(adapter / TASK)
        if (task["kind"], task["labels"]) != (self.kind, list(self.labels)):
            raise TransferError(
                f"adapter {adapter}: expected a module for {self.kind} with the labels "
                f"{', '.join(self.labels)}, got one for {task['kind']} with "
                f"{', '.join(task['labels'])}"
            )


def text_collator(student: TaskModel, teacher: TaskModel, max_length: int) -> TaskTextCollator:
    """Batches for both models; one encoding serves both where their tokenizers read alike."""
    ours, theirs = student.tokenizer, teacher.tokenizer
    alike = (
        tokenizer_digest(ours) == tokenizer_digest(theirs)
        and ours.model_input_names == theirs.model_input_names
    )
    return TaskTextCollator(ours, None if alike else theirs, max_length=max_length)


def device_of(training: dict) -> torch.device:
    """Where a training section runs: the accelerator, unless it says `use_cpu`."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return torch.device("cpu") if found is None or training.get("use_cpu") else found

"""The models, tokenizers, examples and modules of jobs on a task, and what tells them apart."""

import hashlib
import json
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from modxfer_fast.config.model import PretrainedSection
from modxfer_fast.config.task import TaskKind, TaskSection
from modxfer_fast.data import tokenizer_digest
from modxfer_fast.data.tasks import TaskData, load_task, load_task_tokenizer
from modxfer_fast.engine.tasks.distillation import TaskTextCollator
from modxfer_fast.files import write_json
from modxfer_fast.models import Architecture, ModelError
from modxfer_fast.models.task import load_task_model, set_pad_token, task_skeleton
from modxfer_fast.transfer import TransferError
from modxfer_fast.transfer.modules import load_config, same_model

# Of a stage's folder: what PeftModel.from_pretrained loads, or a whole model.
ADAPTER, MODEL = "adapter", "model"
TASK = "task.json"  # beside an adapter: the kind of task, and what its head's classes mean
_FILES = ("*.safetensors", "*.bin", "*.json", "*.txt", "*.model", "*.py")


@lru_cache(maxsize=8)
def _task_of(section_json: str) -> TaskData:
    return load_task(TaskSection.model_validate_json(section_json))


def examples(section: TaskSection) -> TaskData:
    """The examples of a task section."""
    return _task_of(section.model_dump_json())


@lru_cache(maxsize=32)
def _digest_of(section_json: str) -> str:
    return _task_of(section_json).digest()


def examples_digest(section: TaskSection) -> str:
    """`TaskData.digest` of a task section."""
    return _digest_of(section.model_dump_json())


def with_fraction(section: TaskSection, fraction: float) -> TaskSection:
    """The section with another share of its training examples."""
    return section.model_copy(update={"train_fraction": fraction})


@lru_cache(maxsize=8)
def _tokenizer(path: str, kind: str, revision: str | None, trust: bool):
    return load_task_tokenizer(path, kind, revision=revision, trust_remote_code=trust)


def model_identity(section: PretrainedSection) -> dict[str, str | None]:
    """What tells one model from another: a digest of a folder's files, or the commit on the hub.

    Raises:
        ModelError: nothing there.
    """
    options = {"dtype": section.dtype, "attention": section.attn_implementation}
    path = Path(section.path).expanduser()
    if path.is_dir():
        return {"files": folder_digest(path), **options}
    try:
        config = AutoConfig.from_pretrained(
            section.path, revision=section.revision, trust_remote_code=section.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"model {section.path}: cannot be loaded ({error})") from error
    commit = getattr(config, "_commit_hash", None) or section.revision
    return {"hub": section.path, "commit": commit, **options}


def folder_digest(folder: Path) -> str:
    """Short hash of the weights, configuration and tokenizer in a folder."""
    files = sorted({path for pattern in _FILES for path in folder.glob(pattern)})
    stamps = tuple((str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files)
    return _files_digest(stamps)


@lru_cache(maxsize=64)
def _files_digest(stamps: tuple[tuple[str, int, int], ...]) -> str:
    """Stamps only decide when to read again; the digest is of names and contents."""
    digest = hashlib.sha256()
    for path, _, _ in stamps:
        digest.update(Path(path).name.encode())
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:20]


@dataclass(frozen=True)
class JobModel:
    """The base model of one side of a job with a head for its task, and its modules.

    Attributes:
        section: of the configuration. kind, labels: of the task.
        seed: of a head that neither the checkpoint nor a module brings.
        device: where it is loaded.
    """

    section: PretrainedSection
    kind: TaskKind
    labels: tuple[str, ...]
    seed: int
    device: torch.device

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        section = self.section
        return _tokenizer(section.path, self.kind, section.revision, section.trust_remote_code)

    @cached_property
    def identity(self) -> dict[str, str | None]:
        return model_identity(self.section)

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
            return PeftModel.from_pretrained(self.load(), str(adapter), is_trainable=trainable)
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
        task = json.loads((adapter / TASK).read_text(encoding="utf-8"))
        if (task["kind"], task["labels"]) != (self.kind, list(self.labels)):
            raise TransferError(
                f"adapter {adapter}: expected a module for {self.kind} with the labels "
                f"{', '.join(self.labels)}, got one for {task['kind']} with "
                f"{', '.join(task['labels'])}"
            )


def task_collator(student: JobModel, teacher: JobModel, max_length: int) -> TaskTextCollator:
    """Batches for both models; one encoding serves both where their tokenizers read alike."""
    ours, theirs = student.tokenizer, teacher.tokenizer
    alike = (
        tokenizer_digest(ours) == tokenizer_digest(theirs)
        and ours.model_input_names == theirs.model_input_names
    )
    return TaskTextCollator(ours, None if alike else theirs, max_length=max_length)


def device_of(training: dict) -> torch.device:
    """Where a training section runs: the accelerator, unless it says `use_cpu`."""
    if training.get("use_cpu") or not torch.accelerator.is_available():
        return torch.device("cpu")
    return torch.accelerator.current_accelerator()

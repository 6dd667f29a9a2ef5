"""One step of a job. What a stage depends on is all that it can see, so its name is derived.

A stage is built by a function that is given one `StageContext` and nothing else: the folders of its
input stages, and one frozen section of options. The fingerprint is a hash of the same, so that an
option cannot reach the result without reaching the name.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from types import FunctionType
from typing import TYPE_CHECKING, Any

from modxfer_fast._version import __version__
from modxfer_fast.files import SECRETS, read_json
from modxfer_fast.measure.environment import version

if TYPE_CHECKING:  # a benchmark has stages where the packages of a console may be absent
    from modxfer_fast.config.model import CheckpointSection
    from modxfer_fast.report import JobConsole

# raised when stages come to leave other results for the same options
FORMAT = 6
_FILES = ("*.safetensors", "*.bin", "*.json", "*.txt", "*.model", "*.py")
# fields of TrainingArguments that may be the path of a JSON file
_JSON_FILES = ("accelerator_config", "deepspeed", "fsdp_config")
# fields of a training section on which no result depends
HOUSEKEEPING = ("stall_timeout_s", "ddp_timeout", "save_total_limit")


@dataclass(frozen=True)
class StageContext:
    """Everything that a build function sees.

    Attributes:
        folder: empty; what is in it when the function returns is the result.
        checkpoints: a folder beside it, made by whoever writes there. It is no part of the result;
            of a resumable stage it is there again after an interruption.
        inputs: folders of the input stages, by the names that the stage gave them.
        options: those of the stage.
        console: for what a person wants to read on the way.
    """

    folder: Path
    checkpoints: Path
    inputs: Mapping[str, Path]
    options: Any
    console: "JobConsole"


@dataclass(frozen=True)
class Stage:
    """A step whose result is a folder.

    Attributes:
        name: of its kind, such as "teacher"; a folder of the store.
        build: a function of a module, no method and no closure.
        options: a frozen section or dataclass, whose values `facts_of` can tell apart.
        inputs: the stages whose folders `build` reads, each by the name that it reads it under;
            None is none.
        resumable: `build` goes on from what an interrupted run left in `checkpoints`.
        on_all_ranks: every process of the job calls `build`, which is then collective and writes on
            the main process; otherwise the main process does alone, and the others wait.
        title: on the console; the name where it is empty.
        versions: distributions whose version changes the result; ours always does.
    Raises:
        TypeError: options that are not frozen, or a build function that could see something else.
    """

    name: str
    build: Callable[[StageContext], None]
    options: Any
    inputs: Mapping[str, "Stage | None"] = field(default_factory=dict)
    resumable: bool = False
    on_all_ranks: bool = False
    title: str = ""
    versions: tuple[str, ...] = ("torch", "transformers", "peft")

    def __post_init__(self) -> None:
        if not isinstance(self.build, FunctionType) or self.build.__closure__:
            raise TypeError(
                f"stage {self.name}: expected for build a function that sees its context alone, "
                f"got {self.build!r}"
            )
        if not _is_frozen(self.options):
            raise TypeError(
                f"stage {self.name}: expected frozen options, got {type(self.options).__name__}"
            )

    @cached_property
    def facts(self) -> dict[str, Any]:
        """JSON of all that the result depends on."""
        return {
            "options": facts_of(self.options),
            "inputs": {
                name: f"{stage.name}/{stage.fingerprint}"
                for name, stage in self.inputs.items()
                if stage is not None
            },
            "build": f"{self.build.__module__}.{self.build.__qualname__}",
            "format": FORMAT,
            "versions": {
                "modxfer_fast": __version__,
                **{name: version(name) for name in self.versions},
            },
        }

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint(self.facts)


def fingerprint(facts: Any) -> str:
    """Short hash of JSON-like facts, independent of the order of keys."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:20]


def facts_of(value: Any) -> Any:
    """JSON that tells an option from any other.

    An object with an `identity`, as models and examples have, is that; sections and dataclasses are
    their fields. Of the JSON files of a training section their contents count. Secrets, which are
    written nowhere, and HOUSEKEEPING change no result.

    Raises:
        TypeError: any other object. A path above all, which does not say what is there.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if hasattr(value, "identity"):
        return facts_of(value.identity)
    if isinstance(value, Mapping):
        told = {k: v for k, v in value.items() if k not in (*SECRETS, *HOUSEKEEPING)}
        told |= {k: _contents(told[k]) for k in _JSON_FILES if isinstance(told.get(k), str)}
        return {_key(k): facts_of(v) for k, v in told.items()}
    if isinstance(value, list | tuple):
        return [facts_of(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(map(facts_of, value))
    names = getattr(type(value), "model_fields", None)  # of pydantic
    if names is None and dataclasses.is_dataclass(value):
        names = [each.name for each in dataclasses.fields(value)]
    if names is None:
        raise TypeError(f"expected an option that can be told from others, got {value!r}")
    return {name: facts_of(getattr(value, name)) for name in names}


def _contents(given: str) -> Any:
    """Of JSON, or of the file that has it, wherever that is."""
    return json.loads(given) if given.lstrip().startswith("{") else read_json(Path(given))


def _key(key: Any) -> str:
    """Keys of JSON are text, where 1 and "1" would be one."""
    return key if isinstance(key, str) else f"{type(key).__name__} {key}"


@dataclass(frozen=True)
class Live:
    """An object in memory that has no fields to tell it by, and JSON that does."""

    value: Any
    identity: Any


@dataclass(frozen=True)
class OutsideFolder:
    """A model or module that no stage made. What is in the folder tells it, not where it is."""

    path: Path

    @property
    def identity(self) -> str:
        return folder_digest(self.path)


def weights_of(path: str, section: "CheckpointSection") -> dict[str, Any]:
    """What tells a model that no stage made: a digest of a folder's files, or a commit on the hub.

    The commit is that of the files in the hub's cache, the section's revision where it is unknown.

    Raises:
        ModelError: nothing there.
    """
    from modxfer_fast.models import load_model_config

    folder = Path(path).expanduser()
    if folder.is_dir():
        return {"files": folder_digest(folder)}
    config = load_model_config(path, section)
    return {"hub": path, "commit": getattr(config, "_commit_hash", None) or section.revision}


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
            hashlib.file_digest(file, lambda: digest)  # goes on with it
    return digest.hexdigest()[:20]


def _is_frozen(options: Any) -> bool:
    params = getattr(options, "__dataclass_params__", None)
    if params is not None:
        return params.frozen
    return bool(getattr(options, "model_config", {}).get("frozen"))

"""The task section: which labelled examples a module is trained and scored on."""

from typing import Annotated, Any, Literal, get_args

from pydantic import Field, model_validator

from modxfer_fast.config.section import PositiveInt, Section, Seed

TaskKind = Literal["ner", "nli", "paraphrase"]
Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

# Corpora of the hub that have a name here: what task they are, and in which languages they exist.
HUB_KINDS: dict[str, TaskKind] = {"wikineural": "ner", "xnli": "nli", "paws-x": "paraphrase"}
HUB_LANGUAGES = {
    "wikineural": ("de", "en", "es", "fr", "it", "nl", "pl", "pt", "ru"),
    "xnli": (
        *("ar", "bg", "de", "el", "en", "es", "fr", "hi"),
        *("ru", "sw", "th", "tr", "ur", "vi", "zh"),
    ),
    "paws-x": ("de", "en", "es", "fr", "ja", "ko", "zh"),
}
# What an example has: its inputs, then its labels.
COLUMNS: dict[TaskKind, tuple[str, ...]] = {
    "ner": ("words", "tags"),
    "nli": ("text_a", "text_b", "label"),
    "paraphrase": ("text_a", "text_b", "label"),
}
_Files = dict[Split, str | list[str]]


class TaskSection(Section):
    """A task and its examples.

    kind: `ner` labels words with IOB tags; `nli` and `paraphrase` label pairs of texts.
    source: `wikineural`, `xnli` or `paws-x` from the hub, a file, or a folder whose files are named
        train, validation (val, dev) and test, or that `datasets` saved.
    files: in place of source, {split: file or list of files}. A split that has no file is held out
        of train, a tenth of it.
    language: required for the hub; a note for local files.
    format: of local files. `auto` goes by the ending: .conll .conllu .iob2 .bio are conll, .csv
        csv, .json .jsonl json, .tsv tsv, and .txt is conll for ner and tsv otherwise.
    columns: where local files hold {words, tags} or {text_a, text_b, label}: a name, or for conll
        an index, by default the last for tags, and for words 1 in .conllu files, else 0.
    labels: names in the order of their ids; null takes those of the data.
    split_seed: chooses the held-out examples, and those that the limits and the fraction keep.
    train_fraction: the share of the training examples to keep; with one seed, a smaller share is
        inside a larger one.
    max_length: tokens of an example, special ones included; what is longer is truncated.
    """

    kind: TaskKind
    source: str | None = None
    files: Annotated[_Files, Field(min_length=1)] | None = None
    language: str | None = None
    revision: str | None = None
    format: Literal["auto", "conll", "tsv", "csv", "json"] = "auto"
    columns: dict[str, str | int] = {}
    labels: Annotated[list[str], Field(min_length=2)] | None = None
    split_seed: Seed = 0
    train_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_train_examples: PositiveInt | None = None
    max_validation_examples: PositiveInt | None = None
    max_test_examples: PositiveInt | None = None
    max_length: Annotated[int, Field(ge=4)] = 128

    @model_validator(mode="after")
    def _consistent(self):
        if (self.source is None) == (self.files is None):
            raise ValueError("expected exactly one of source and files")
        if self.files is not None and "train" not in self.files:
            raise ValueError(f"files: expected one for train, got {_listed(self.files)}")
        if self.labels is not None and len(set(self.labels)) != len(self.labels):
            raise ValueError(f"labels: expected different names, got {_listed(self.labels)}")
        unknown = set(self.columns) - set(COLUMNS[self.kind])
        if unknown:
            raise ValueError(
                f"columns: expected {_listed(COLUMNS[self.kind])} for {self.kind}, "
                f"got {_listed(sorted(unknown))}"
            )
        if self.source in HUB_KINDS:
            self._check_hub(self.source)
        return self

    def _check_hub(self, source: str) -> None:
        if self.kind != HUB_KINDS[source]:
            raise ValueError(
                f"source: expected one for {self.kind}, got {source}, which is for "
                f"{HUB_KINDS[source]}"
            )
        available = HUB_LANGUAGES[source]
        if self.language not in available:
            got = "none" if self.language is None else self.language
            raise ValueError(
                f"language: expected one of {source}'s {_listed(available)}, got {got}"
            )
        for name in ("format", "columns"):
            # one that says its default is what a job wrote down of itself
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name}: expected for local files only, got source {source}")


def _listed(names: Any) -> str:
    return ", ".join(map(str, names))

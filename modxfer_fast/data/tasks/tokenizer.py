"""The tokenizer of a task: fast, padding, and fit for words that were split before."""

from typing import Any

from tokenizers import normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerBase

from modxfer_fast.config.task import TaskKind
from modxfer_fast.data.errors import DataError
from modxfer_fast.data.tokenizer import read_tokenizer


def load_task_tokenizer(
    path: str, kind: TaskKind, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a folder or hub id.

    Byte-level tokenizers (RoBERTa, GPT-2, Llama 3) write a space into the token that follows it;
    for ner they are told to write one before every word, else words would run together.

    Raises:
        DataError: nothing there, no fast tokenizer, or none that pads.
    """
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    tokenizer = read_tokenizer(path, **options)
    if kind == "ner" and tokenizer.is_fast and _runs_words_together(tokenizer):
        # the classes that write the space themselves also save that they do
        tokenizer = read_tokenizer(path, add_prefix_space=True, **options)
        if _runs_words_together(tokenizer):
            _write_spaces(tokenizer.backend_tokenizer)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise DataError(
                f"tokenizer {path}: expected a padding or end-of-text token, got neither"
            )
        tokenizer.pad_token = tokenizer.eos_token
    check_task_tokenizer(tokenizer, kind)
    return tokenizer


def check_task_tokenizer(tokenizer: PreTrainedTokenizerBase, kind: TaskKind) -> None:
    """Raise a DataError unless `tokenizer` can encode examples of `kind`."""
    name = tokenizer.name_or_path or type(tokenizer).__name__
    if not tokenizer.is_fast:
        raise DataError(f"tokenizer {name}: expected a fast one, got {type(tokenizer).__name__}")
    if tokenizer.pad_token_id is None:
        raise DataError(f"tokenizer {name}: expected a padding token, got none")
    if kind == "ner" and _runs_words_together(tokenizer):
        raise DataError(
            f"tokenizer {name}: expected one that writes a space before each word that was split "
            "before, such as one with add_prefix_space=True, got one that runs words together"
        )


def _runs_words_together(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether two words that were split before encode otherwise than with a space between."""
    split = tokenizer(["a", "a"], is_split_into_words=True)["input_ids"]
    return split != tokenizer("a a")["input_ids"]


def _write_spaces(backend) -> None:
    """Make a `tokenizers.Tokenizer` put a space before what it encodes."""
    step = backend.pre_tokenizer
    if isinstance(step, pre_tokenizers.ByteLevel):
        step.add_prefix_space = True
        backend.pre_tokenizer = step
        return
    # behind a split by pattern the option would put a space before every part of a word
    steps = [normalizers.Prepend(" ")]
    if backend.normalizer is not None:
        steps.append(backend.normalizer)
    backend.normalizer = normalizers.Sequence(steps)

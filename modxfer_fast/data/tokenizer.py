"""Byte-level BPE trained on the corpus, or a tokenizer loaded from a folder or hub id.

One of a task is fast, pads, and is fit for words that were split before.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from modxfer_fast.config.task import TaskKind
from modxfer_fast.errors import DataError, not_loaded

END, PAD, TURN_START, TURN_END = "<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"
_FILES = ("tokenizer*", "vocab.*", "merges.txt", "*.model", "*.tiktoken")
_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE: any text round-trips, there is no unknown token.

    The vocabulary is smaller than `vocab_size` when the texts hold too few different pairs.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END, PAD, TURN_START, TURN_END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END, eos_token=END, pad_token=PAD
    )
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer


def read_tokenizer(
    path: str, *, revision: str | None = None, trust_remote_code: bool = False, **options: Any
) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub id as it is, or a DataError; `options` of its class."""
    place = Path(path).expanduser() if path.startswith((".", "/", "~")) else None
    if place is not None and not place.exists():
        raise DataError(f"tokenizer {path}: no such folder")
    options |= {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        return AutoTokenizer.from_pretrained(path if place is None else str(place), **options)
    except Exception as error:  # transformers raises several types, `tokenizers` a bare Exception
        raise DataError(not_loaded("tokenizer", path, error)) from error


def load_tokenizer(
    path: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    kind: str = "causal_lm",
) -> PreTrainedTokenizerBase:
    """Load a tokenizer and see to its padding token.

    kind: of the model it is for; an "encoder" needs padding of its own, and no end of text.

    Raises:
        DataError: nothing there, or a tokenizer without the token that `kind` needs.
    """
    tokenizer = read_tokenizer(path, revision=revision, trust_remote_code=trust_remote_code)
    if kind == "encoder":
        if tokenizer.pad_token_id is None:
            raise DataError(f"tokenizer {path}: expected a padding token (pad_token), got none")
        if not tokenizer.is_fast:
            raise DataError(
                f"tokenizer {path}: expected a fast one (tokenizer.json), which can cut long texts "
                f"into rows, got {type(tokenizer).__name__}"
            )
        return tokenizer
    if tokenizer.eos_token_id is None:
        raise DataError(f"tokenizer {path}: expected an end-of-text token (eos_token), got none")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


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
    others = [] if backend.normalizer is None else [backend.normalizer]
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(" "), *others])


def has_tokenizer(folder: str | Path) -> bool:
    """Whether a folder holds any file of a tokenizer, whole or not."""
    folder = Path(folder).expanduser()
    return any(path for pattern in _FILES for path in folder.glob(pattern))


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Short hash of what turns text into ids: the vocabulary and the fast model, if any."""
    state = json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=True)
    if tokenizer.is_fast:
        # a call with truncation or padding leaves them set
        untouched = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        untouched.no_truncation()
        untouched.no_padding()
        state += untouched.to_str()
    return hashlib.sha256(state.encode()).hexdigest()[:16]

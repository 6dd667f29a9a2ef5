"""Examples -> token ids and labels, padded by batch.

The first sub-token of a word carries its tag, the others IGNORE_INDEX.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedTokenizerBase
from transformers.data import data_collator

from modxfer_fast.config.task import TaskKind
from modxfer_fast.data.collator import IGNORE_INDEX, first_tokens
from modxfer_fast.data.tasks.load import TaskData
from modxfer_fast.data.tokenizer import check_task_tokenizer

_CHUNK = 10_000  # examples whose ids are Python lists at one time


@dataclass(frozen=True)
class EncodedTask:
    """A split as a model reads it.

    rows: input_ids, attention_mask and what else the tokenizer gives, labels, and length.
    gold: by row, a class per word for ner, or the class of the pair; also where truncation cut it.
    labelled_words: by row, for ner, the words whose tag a token carries.
    truncated: examples that were longer than max_length.
    """

    kind: TaskKind
    labels: tuple[str, ...]
    rows: Dataset
    gold: list[Any]
    labelled_words: list[list[int]]
    truncated: int

    def __len__(self) -> int:
        return len(self.gold)

    def by_length(self) -> "EncodedTask":
        """The longest first: batches in order then hold rows of about one length."""
        lengths = list(self.rows["length"])
        order = sorted(range(len(self)), key=lambda i: -lengths[i])
        return replace(
            self,
            rows=self.rows.select(order),
            gold=[self.gold[i] for i in order],
            labelled_words=[self.labelled_words[i] for i in order] if self.labelled_words else [],
        )


def encode_task(data: TaskData, split: str, tokenizer: PreTrainedTokenizerBase) -> EncodedTask:
    """Encode a split of `data`, at most `data.max_length` tokens and what the tokenizer allows.

    Raises:
        DataError: unknown split, or a tokenizer that does not fit the task.
    """
    check_task_tokenizer(tokenizer, data.kind)
    examples = data.split(split)
    encode = _encode_words if data.kind == "ner" else _encode_pairs
    max_length = min(data.max_length, tokenizer.model_max_length)
    chunks, labelled_words, truncated = [], [], 0
    for start in range(0, len(examples), _CHUNK):
        chunk = examples[start : start + _CHUNK]
        encoded, labels, labelled = encode(chunk, tokenizer, max_length)
        columns = dict(encoded)
        lengths = [len(ids) for ids in columns["input_ids"]]
        chunks.append(Dataset.from_dict({**columns, "labels": labels, "length": lengths}))
        labelled_words += labelled
        truncated += sum(bool(encoding.overflowing) for encoding in encoded.encodings)
    gold = list(examples["tags" if data.kind == "ner" else "label"])
    return EncodedTask(
        data.kind, data.labels, concatenate_datasets(chunks), gold, labelled_words, truncated
    )


def _encode_words(chunk: dict[str, list], tokenizer, max_length: int):
    encoded = tokenizer(
        chunk["words"],
        is_split_into_words=True,
        truncation=True,
        max_length=max_length,
        verbose=False,
    )
    labels, labelled = [], []
    for row, tags in enumerate(chunk["tags"]):
        words = encoded.word_ids(row)
        firsts = first_tokens(words)
        labels.append([IGNORE_INDEX] * len(words))
        for word, token in firsts.items():
            labels[-1][token] = tags[word]
        labelled.append(list(firsts))
    return encoded, labels, labelled


def _encode_pairs(chunk: dict[str, list], tokenizer, max_length: int):
    encoded = tokenizer(
        chunk["text_a"], chunk["text_b"], truncation=True, max_length=max_length, verbose=False
    )
    return encoded, chunk["label"], []


def task_collator(kind: TaskKind, tokenizer: PreTrainedTokenizerBase) -> Callable:
    """Pads rows, and for ner their labels, to the longest of the batch."""
    if kind == "ner":
        return data_collator.DataCollatorForTokenClassification(
            tokenizer, label_pad_token_id=IGNORE_INDEX
        )
    return data_collator.DataCollatorWithPadding(tokenizer)

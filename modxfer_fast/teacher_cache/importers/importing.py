"""From the entries of another program into a cache, once they are known to be a teacher's."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from modxfer_fast.teacher_cache.documents import Document, key_of
from modxfer_fast.teacher_cache.importers.entries import Entry, Foreign, ImportRefused
from modxfer_fast.teacher_cache.store import Payload, TeacherCache

SHARD_BYTES = 2**28
_PROBED = 4096  # tokens that tell readings apart
_BETTER = 0.05  # nats a token that another reading may be better by


@dataclass(frozen=True)
class Imported:
    """What came of an import.

    Attributes:
        cache: with the documents.
        documents: that came with it now.
        other: documents of the other program that the job does not have.
        score: mean log-probability that the answers give to the tokens that follow, of a sample.
        guess: what the frequencies of the tokens alone give to them.
    """

    cache: TeacherCache
    documents: int
    other: int
    score: float
    guess: float


def import_answers(
    source: Foreign,
    documents: Iterable[tuple[Document, Tensor]],
    create: Callable[[Payload], TeacherCache],
    reading: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Imported:
    """Takes the answers to `documents` over, those that the cache has already excepted.

    Args:
        documents: of a job, each with [n] bool, the positions that it learns at.
        create: makes the cache, or opens the one there; called once the reading is known to be
            right, so that nothing is left of a refused import.
        reading: one of the format's; None for its usual one.
        shard_bytes: about what a shard has.

    Raises:
        ImportRefused: nothing of the job there, a reading that the text speaks against, or an
            entry that cannot be read; shards that were written before it stay, and are whole.
        CacheError: the cache there is another teacher's.
    """
    wanted = {document.key: (document, learnt) for document, learnt in documents}
    sample = list(_sample(source, wanted))
    if not sample:
        raise ImportRefused(
            f"{source.path}: expected documents of the job, with the same tokens, got none; the "
            "tokenizer, the chat template and data.max_length must be those it was made with"
        )
    reading = reading or source.readings[0]
    if reading not in source.readings:
        raise ImportRefused(
            f"{source.path}: expected a reading among {', '.join(source.readings)}, got {reading}"
        )
    score, guess = check_reading(source, sample, wanted, reading)
    cache = create(source.payload(sample[0]))
    tokens = shard_bytes // cache.payload.bytes_per_token()
    other = done = size = 0
    seen, shard = set[bytes](), list[tuple[Document, dict[str, Tensor]]]()
    for entry in source.entries():
        key = key_of(entry.ids)
        if key not in wanted:
            other += 1
            continue
        if key in seen or key in cache:
            continue
        seen.add(key)
        document, learnt = wanted[key]
        answers = source.answers(entry, reading)
        _check_listed(source, entry, answers, learnt)
        if shard and size + len(document.ids) > tokens:
            cache.write(shard)
            shard, size = [], 0
        shard.append((document, answers))
        size += len(document.ids)
        done += 1
    if shard:
        cache.write(shard)
    return Imported(cache, done, other, score, guess)


def check_reading(
    source: Foreign,
    sample: list[Entry],
    wanted: Mapping[bytes, tuple[Document, Tensor]],
    reading: str,
) -> tuple[float, float]:
    """Whether a reading knows what comes next: better than frequencies do, and than any other.

    Returns:
        Mean log-probabilities of the tokens that follow: by the answers, and by the frequencies of
        tokens in the documents of the job.

    Raises:
        ImportRefused: naming the better reading, where there is one.
    """
    frequencies = _log_frequencies(wanted, source.head.weight.shape[0])
    guess = _mean([frequencies[entry.ids[1:].long()] for entry in sample])
    scores = {
        each: _mean([source.following(entry, source.answers(entry, each)) for entry in sample])
        for each in source.readings
    }
    score, best = scores[reading], max(scores, key=lambda each: scores[each])
    told = (
        f"{source.path}: expected answers of the teacher to the tokens before each position, but "
        f'read as "{reading}" they give the next one {score:.2f} nats'
    )
    if scores[best] > max(score + _BETTER, guess):
        raise ImportRefused(f'{told}, and as "{best}" {scores[best]:.2f}; say so (--as "{best}")')
    if not score > guess:
        raise ImportRefused(
            f"{told}, where the frequencies of tokens alone give {guess:.2f}, and no other reading "
            f"({', '.join(source.readings)}) gives more than {scores[best]:.2f}: they are of "
            "another layer, another teacher or another tokenizer"
        )
    return score, guess


def _sample(source: Foreign, wanted: Mapping[bytes, tuple[Document, Tensor]]) -> Iterator[Entry]:
    tokens = 0
    for entry in source.entries():
        if key_of(entry.ids) in wanted and len(entry.ids) > 1:
            yield entry
            tokens += len(entry.ids)
            if tokens >= _PROBED:
                return


def _check_listed(
    source: Foreign, entry: Entry, answers: Mapping[str, Tensor], learnt: Tensor
) -> None:
    listed = source.listed(answers)
    if listed is not None and (learnt & ~listed).any():
        position = int((learnt & ~listed).nonzero()[0])
        raise ImportRefused(
            f"{entry.place}: expected classes for each token that the job learns, got none for the "
            f"one after token {position}"
        )


def _log_frequencies(wanted: Mapping[bytes, tuple[Document, Tensor]], classes: int) -> Tensor:
    """[V], of tokens in documents, each class counted once more than it occurs."""
    counts = torch.ones(classes, dtype=torch.float64)
    for document, _ in wanted.values():
        counts += torch.bincount(document.ids.long(), minlength=classes)
    return (counts / counts.sum()).log()


def _mean(parts: list[Tensor]) -> float:
    values = torch.cat([part.double() for part in parts])
    values = values[~values.isnan()]
    return float(values.mean()) if len(values) else -math.inf

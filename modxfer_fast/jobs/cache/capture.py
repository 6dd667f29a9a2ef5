"""A teacher's answers to documents, into a cache: in any order, by any number of processes.

Processes share the shards. A teacher that none of them has whole answers only where all ask at
once: whoever is done asks on, for one token, until the others are.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import chain

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from modxfer_fast import teacher_topk
from modxfer_fast.engine import ServedTeacher, ShardedTeacher, Teacher
from modxfer_fast.engine.batch import Answer, Batch
from modxfer_fast.kernels.kd_loss.topk import log_mass_beside
from modxfer_fast.teacher_cache import CacheError, Document, Payload, TeacherCache

_SHARD_BYTES = 2**28
# kernels of one model in half precision differ by hundredths, and near ties change places
_OTHER_MODEL, _SAME_MODEL = 0.1, 0.8


def capture(
    cache: TeacherCache,
    documents: Iterable[Document],
    teacher: Teacher | ServedTeacher,
    *,
    batch_tokens: int,
    device: torch.device,
    part: tuple[int, int] = (0, 1),
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Asks the teacher for what the cache lacks, shard by shard; one that is killed goes on there.

    All processes must find the same documents in the cache when they begin.

    Args:
        teacher: one in parts is asked by all processes equally often.
        batch_tokens: most tokens of a batch, padding included; a longer document is one by itself.
        part: of (number, count) processes, which share the shards.
        tell: is given documents done and to do of this process, after each shard.

    Returns:
        Documents that were asked for by this process.
    """
    missing = [document for document in documents if document.key not in cache]
    number, count = part
    whole = list(_shards(missing, _SHARD_BYTES // cache.payload.bytes_per_token()))
    shards = [list(_batches(shard, batch_tokens)) for shard in whole]
    done, total = 0, sum(map(len, whole[number::count]))
    teacher.to(device)
    for batches in shards[number::count]:
        if isinstance(teacher, ServedTeacher):  # which is asked for several at a time
            cache.write(list(told_answers(chain.from_iterable(batches), teacher)))
        else:
            own = (_answers(batch, teacher, cache.payload, device) for batch in batches)
            cache.write(list(chain.from_iterable(own)))
        done += sum(map(len, batches))
        tell(done, total)
    if isinstance(teacher, ShardedTeacher):
        asked = [sum(map(len, shards[process::count])) for process in range(count)]
        for _ in range(max(asked) - asked[number]):
            teacher.answer(Batch({"input_ids": torch.zeros(1, 1, dtype=torch.long, device=device)}))
    return done


def told_answers(
    documents: Iterable[Document], teacher: ServedTeacher
) -> Iterator[tuple[Document, dict[str, Tensor]]]:
    """What a server tells, as a cache keeps it: [n, width] each."""
    for document, (ids, log_probs) in teacher.source.ask(documents):
        present = log_probs.double().masked_fill(ids < 0, -torch.inf)
        log_tail = log_mass_beside(present, log_probs.dtype)
        yield (
            document,
            {"topk_ids": ids, "topk_log_probs": log_probs, "topk_log_tail": log_tail[:, None]},
        )


def check_told(cache: TeacherCache, document: Document, teacher: ServedTeacher) -> None:
    """Raises a CacheError where a server now answers a kept document otherwise."""
    kept = cache.read(document)
    ((_, told),) = told_answers([document], teacher)
    difference = (told["topk_log_probs"] - kept["topk_log_probs"]).abs().mean().item()
    same = (told["topk_ids"] == kept["topk_ids"])[:, 0].double().mean().item()
    if difference > _OTHER_MODEL or same < _SAME_MODEL:
        raise CacheError(
            f"teacher cache {cache.folder}: expected a server that answers as when it was filled, "
            f"got log-probabilities that differ by {difference:.3f} nats, and {same:.0%} of "
            "likeliest tokens the same, in a document; it serves other weights under that name"
        )


def _shards(documents: list[Document], tokens: int) -> Iterator[list[Document]]:
    """Runs of documents that have about so many tokens."""
    shard: list[Document] = []
    size = 0
    for document in documents:
        if shard and size + len(document.ids) > tokens:
            yield shard
            shard, size = [], 0
        shard.append(document)
        size += len(document.ids)
    if shard:
        yield shard


def _batches(shard: list[Document], tokens: int) -> Iterator[list[Document]]:
    """Of documents of like lengths, with at most so many tokens, padding included."""
    longest_first = sorted(shard, key=lambda document: -len(document.ids))
    while longest_first:
        rows = max(tokens // len(longest_first[0].ids), 1)
        yield longest_first[:rows]
        longest_first = longest_first[rows:]


def _answers(
    batch: list[Document], teacher: Teacher, payload: Payload, device: torch.device
) -> Iterator[tuple[Document, dict[str, Tensor]]]:
    ids = pad_sequence([document.ids.long() for document in batch], batch_first=True)
    lengths = torch.tensor([len(document.ids) for document in batch])
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
    kept = _kept(teacher.answer(Batch(inputs)), payload)
    for row, document in enumerate(batch):
        yield document, {name: each[row, : len(document.ids)].cpu() for name, each in kept.items()}


def _kept(answer: Answer, payload: Payload) -> dict[str, Tensor]:
    """What a cache keeps of an answer, [B, T, width] each."""
    kept = {}
    if payload.hidden is not None:
        kept["hidden"] = answer.output
    if payload.top_k:
        assert answer.head is not None
        weight, bias = answer.head
        listed = teacher_topk(
            answer.output,
            weight,
            k=payload.top_k,
            teacher_bias=bias,
            **answer.bend.options("teacher"),
        )
        assert listed.log_tail is not None
        kept |= {
            "topk_ids": listed.ids,
            "topk_log_probs": listed.log_probs,
            "topk_log_tail": listed.log_tail[..., None],
        }
    return kept

"""A teacher's answers to documents, into a cache: in any order, by any number of processes.

Processes share the shards. A teacher that none of them has whole answers only where all ask at
once: whoever is done asks on, for one token, until the others are.
"""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from modxfer_fast import teacher_topk
from modxfer_fast.engine import ShardedTeacher, Teacher
from modxfer_fast.engine.batch import Answer, Batch
from modxfer_fast.teacher_cache import Document, Payload, TeacherCache

_SHARD_BYTES = 2**28


def capture(
    cache: TeacherCache,
    documents: Iterable[Document],
    teacher: Teacher,
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
        cache.write([each for b in batches for each in _answers(b, teacher, cache.payload, device)])
        done += sum(map(len, batches))
        tell(done, total)
    if isinstance(teacher, ShardedTeacher):
        asked = [sum(map(len, shards[process::count])) for process in range(count)]
        for _ in range(max(asked) - asked[number]):
            teacher.answer(Batch({"input_ids": torch.zeros(1, 1, dtype=torch.long, device=device)}))
    return done


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

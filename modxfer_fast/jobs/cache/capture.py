"""A teacher's answers to documents, into a cache: in any order, by any number of processes."""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from modxfer_fast import teacher_topk
from modxfer_fast.engine import Teacher
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

    Args:
        batch_tokens: most tokens of a batch, padding included; a longer document is one by itself.
        part: of (number, count) processes, which share the shards.
        tell: is given documents done and to do of this process, after each shard.

    Returns:
        Documents that were asked for by this process.
    """
    missing = [document for document in documents if document.key not in cache]
    number, count = part
    shards = list(_shards(missing, _SHARD_BYTES // cache.payload.bytes_per_token()))[number::count]
    done, total = 0, sum(map(len, shards))
    teacher.to(device)
    for shard in shards:
        cache.write(list(_answers(shard, teacher, cache.payload, batch_tokens, device)))
        done += len(shard)
        tell(done, total)
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


def _answers(
    shard: list[Document],
    teacher: Teacher,
    payload: Payload,
    batch_tokens: int,
    device: torch.device,
) -> Iterator[tuple[Document, dict[str, Tensor]]]:
    longest_first = sorted(shard, key=lambda document: -len(document.ids))
    while longest_first:
        rows = max(batch_tokens // len(longest_first[0].ids), 1)
        batch, longest_first = longest_first[:rows], longest_first[rows:]
        ids = pad_sequence([document.ids.long() for document in batch], batch_first=True)
        lengths = torch.tensor([len(document.ids) for document in batch])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
        kept = _kept(teacher.answer(Batch(inputs)), payload)
        for row, document in enumerate(batch):
            own = {name: tensor[row, : len(document.ids)].cpu() for name, tensor in kept.items()}
            yield document, own


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

"""What each format of a teacher cache costs on disk, and what it changes in a student's loss.

    python -m benchmarks.cache_formats MODEL

MODEL is the folder or hub id of a causal language model. Students are the teacher without some of
its blocks: "near" lacks one in the middle, "far" every third. The truth is KL(teacher || student)
of the teacher run in fp64, and its gradient in the student's logits; the answers are those of the
teacher in fp32, written to a cache and read again. Errors: of the mean divergence, relative, and
|g - truth| / |truth| of the gradient, each of K + 1 classes for lists with a bucket for the others.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from modxfer_fast import teacher_topk
from modxfer_fast.data.python_docs import python_docs
from modxfer_fast.measure import environment
from modxfer_fast.teacher_cache import Document, Payload, TeacherCache, key_of

HIDDEN = ("float32", "bfloat16", "float16")
TOP_K = (16, 64, 256)


def payloads(width: int) -> dict[str, Payload]:
    """Those of the table, by their names in it."""
    found = {f"hidden, {dtype}": Payload(dtype, width) for dtype in HIDDEN}
    return found | {f"top-{k} and bucket": Payload(top_k=k) for k in TOP_K}


def documents(tokenizer, number: int, length: int) -> Iterator[Document]:
    """The first texts of the standard library's documentation that are long enough."""
    for text in python_docs():
        ids = tokenizer(text[: 20 * length])["input_ids"][:length]
        if len(ids) == length:
            own = torch.tensor(ids, dtype=torch.int32)
            yield Document(key_of(own), 0, 0, own)
            number -= 1
        if number == 0:
            return


@torch.no_grad()
def states(model: PreTrainedModel, document: Document) -> Tensor:
    """[n, D], of the dtype of the model."""
    decoder = model.get_decoder()
    return decoder(input_ids=document.ids.long()[None], use_cache=False)[0][0]


def student_logits(model: PreTrainedModel, dropped: set[int], document: Document) -> Tensor:
    """[n, V] of the model without some of its blocks."""
    blocks = model.get_decoder().layers
    hooks = [blocks[i].register_forward_hook(lambda _, given, out: given[0]) for i in dropped]
    try:
        return model.get_output_embeddings()(states(model, document))
    finally:
        for hook in hooks:
            hook.remove()


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """[n], of rows of log-probabilities [n, C]."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def of_answers(found: dict[str, Tensor], weight: Tensor, log_q: Tensor) -> Tensor:
    """[n], KL(answers || student) in fp64; lists are of K + 1 classes."""
    if "hidden" in found:
        return divergence((found["hidden"].double() @ weight.T).log_softmax(-1), log_q)
    ids = found["topk_ids"].long()
    log_p = torch.cat([found["topk_log_probs"], found["topk_log_tail"]], -1).double()
    rest = log_q.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    return divergence(log_p, torch.cat([log_q.gather(-1, ids), rest], -1))


def with_gradient(loss: Callable[[Tensor], Tensor], logits: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of a loss of log-probabilities over rows, and its gradient in logits [n, V]."""
    logits = logits.clone().requires_grad_()
    total = loss(logits.log_softmax(-1)).sum()
    total.backward()
    assert logits.grad is not None
    return total.detach(), logits.grad


def answers(model: PreTrainedModel, document: Document, payload: Payload) -> dict[str, Tensor]:
    hidden = states(model, document)
    if payload.hidden is not None:
        return {"hidden": hidden}
    weight = model.get_output_embeddings().weight.detach()
    listed = teacher_topk(hidden, weight, k=payload.top_k)
    assert listed.log_tail is not None
    return {
        "topk_ids": listed.ids,
        "topk_log_probs": listed.log_probs,
        "topk_log_tail": listed.log_tail[:, None],
    }


@dataclass(frozen=True)
class Row:
    """Of a format and a student: see the head of this file; `kl` is the truth, a token."""

    student: str
    format: str
    kl: float
    bytes_per_token: int
    kl_error: float
    gradient_error: float


def measure(
    model: PreTrainedModel, exact: PreTrainedModel, texts: list[Document], folder: str
) -> Iterator[Row]:
    """Every format in turn, for each student.

    Args:
        model: the teacher that answers. exact: the same in fp64. folder: for the caches.
    """
    weight = exact.get_output_embeddings().weight
    caches = {}
    for name, payload in payloads(weight.shape[1]).items():
        caches[name] = TeacherCache.create(f"{folder}/{name}", payload, {}, {})
        caches[name].write([(text, answers(model, text, payload)) for text in texts])
    blocks = len(exact.get_decoder().layers)
    students = {"near": {blocks // 2}, "far": set(range(1, blocks, 3))}
    tokens = sum(len(text.ids) for text in texts)
    for student, dropped in students.items():
        truth = squares = 0.0
        totals, misses = dict.fromkeys(caches, 0.0), dict.fromkeys(caches, 0.0)
        for text in texts:
            logits = student_logits(exact, dropped, text)
            log_p = (states(exact, text) @ weight.T).log_softmax(-1)
            total, gradient = with_gradient(partial(divergence, log_p), logits)
            truth += float(total)
            squares += float(gradient.square().sum())
            for name, cache in caches.items():
                loss = partial(of_answers, cache.read(text), weight)
                total, own = with_gradient(loss, logits)
                totals[name] += float(total)
                misses[name] += float((own - gradient).square().sum())
        for name, cache in caches.items():
            yield Row(
                student=student,
                format=name,
                kl=truth / tokens,
                bytes_per_token=cache.payload.bytes_per_token(),
                kl_error=(totals[name] - truth) / truth,
                gradient_error=(misses[name] / squares) ** 0.5,
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cache_formats", description=__doc__.splitlines()[0]
    )
    parser.add_argument("model", help="folder or hub id of a causal language model")
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--length", type=int, default=128, help="tokens of a document")
    args = parser.parse_args()
    model, exact = (
        AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).requires_grad_(False)
        for dtype in (torch.float32, torch.float64)
    )
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    texts = list(documents(tokenizer, args.documents, args.length))
    print(environment.header(environment.describe("cpu")))
    print(f"{sum(len(text.ids) for text in texts)} tokens, {model.config.vocab_size:,} classes")
    print("student     KL  format              bytes/token   KL error  gradient error")
    with tempfile.TemporaryDirectory() as folder:
        for row in measure(model, exact, texts, folder):
            print(
                f"{row.student:7} {row.kl:6.3f}  {row.format:18} {row.bytes_per_token:12,} "
                f"{row.kl_error:10.1e} {row.gradient_error:15.1e}",
                flush=True,
            )


if __name__ == "__main__":
    main()

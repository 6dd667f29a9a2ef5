"""The K likeliest tokens behind each one of documents, from a server: asked now, had later."""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import torch

from modxfer_fast.kernels.kd_loss.topk import ROUNDING
from modxfer_fast.serving.answers import Listed, WireFormat
from modxfer_fast.serving.client import Request, Server, ServerError
from modxfer_fast.serving.opening import check_served
from modxfer_fast.teacher_cache import Document


class ListedAnswers:
    """A served model, asked about documents, several in a request.

    Args:
        model: by the name it is served under.
        classes: of its vocabulary; a reply with others is refused.
        request_tokens: most tokens of a request; a longer document is one by itself.
    """

    def __init__(
        self,
        server: Server,
        wire: WireFormat,
        model: str,
        *,
        classes: int,
        top_k: int,
        request_tokens: int = 8192,
    ):
        self.server, self.wire, self.model = server, wire, model
        self.classes, self.top_k, self.request_tokens = classes, top_k, request_tokens

    def submit(self, documents: Iterable[Document]) -> "list[tuple[list[Document], Future]]":
        """Asks; the future of each request holds a `Listed` a document, in their order."""
        return [(group, self._submit(group)) for group in self._groups(documents)]

    def ask(self, documents: Iterable[Document]) -> Iterator[tuple[Document, Listed]]:
        """The answers to documents, each as soon as it and those before it are there.

        Raises:
            ServerError: see `Server`, or a reply that is no answer to them.
        """
        for group, future in self.submit(documents):
            yield from zip(group, future.result(), strict=True)

    def check(self, text: str, ids: Sequence[int], last: int, max_length: int) -> None:
        """Looks, before anything long begins, at whether this server can teach.

        Args:
            text, ids: cut by our tokenizer, without special tokens.
            last: the largest token of our tokenizer, which the server must know.
            max_length: tokens of a document at most.

        Raises:
            ServerError: another model or tokenizer, texts too long for it, or too few classes told.
        """
        check_served(self.server, self.model, max_length + 1, "a document and one more")
        request = self.wire.tokenised(self.model, text)
        theirs = self.server.decoded(request, self.server.ask(request), self.wire.tokens)
        added = max(len(theirs) - len(ids), 0)  # a start token, where it cannot be left out
        if theirs[added:] != list(ids) or added > 1:
            raise self.server.fault(
                request,
                f"expected the tokens of our tokenizer, {_some(ids)}, got {_some(theirs)}: it "
                "serves a model of another tokenizer",
            )
        request = self.wire.listed(self.model, [[*ids, last]], self.top_k)
        try:
            reply = self.server.ask(request)
        except ServerError as error:
            if self.wire.more_classes and "logprobs" in str(error):
                raise ServerError(
                    f"{error}; start the server with {self.wire.more_classes} {self.top_k}, or "
                    "set a smaller top_k"
                ) from error
            raise
        self._read(request, reply, [[*ids, last]])

    def _groups(self, documents: Iterable[Document]) -> Iterator[list[Document]]:
        group: list[Document] = []
        tokens = 0
        for document in documents:
            if group and tokens + len(document.ids) > self.request_tokens:
                yield group
                group, tokens = [], 0
            group.append(document)
            tokens += len(document.ids)
        if group:
            yield group

    def _submit(self, group: list[Document]) -> Future:
        texts = [document.ids.tolist() for document in group]
        request = self.wire.listed(self.model, texts, self.top_k)
        return self.server.submit(request, lambda reply: self._read(request, reply, texts))

    def _read(self, request: Request, reply: object, texts: list[list[int]]) -> list[Listed]:
        def read(reply: object) -> list[Listed]:
            found = self.wire.read(reply, texts, self.top_k)
            for each in found:
                check_listed(each, self.classes)
            return found

        return self.server.decoded(request, reply, read)


def check_listed(listed: Listed, classes: int) -> None:
    """Raises ValueError of what is no teacher's; the last row is not known, and not looked at."""
    ids, log_probs = listed.ids[:-1], listed.log_probs[:-1].double()
    outside = (ids < 0) | (ids >= classes)
    if outside.any():
        raise ValueError(
            f"expected tokens below {classes:,}, the vocabulary of the teacher's configuration, "
            f"got {ids[outside][0].item():,}"
        )
    # NaN is above everything here
    above = ~(log_probs <= ROUNDING)
    if above.any():
        raise ValueError(
            f"expected log-probabilities, at most 0, got {log_probs[above][0].item():.6g}"
        )
    sums = log_probs.exp().sum(-1)
    if (sums > 1 + ROUNDING).any():
        raise ValueError(
            f"expected probabilities of a sum of at most 1, got {sums.max().item():.6g}"
        )


class Pending:
    """What was asked about the documents of a batch.

    Args:
        asked: as `ListedAnswers.submit` returns it.
        shape: (rows, tokens) of the batch.
    """

    def __init__(
        self, asked: list[tuple[list[Document], Future]], shape: tuple[int, int], top_k: int
    ):
        self._asked, self._shape, self._top_k = asked, shape, top_k
        self._listed: Listed | None = None

    def __getstate__(self) -> dict[str, Any]:  # of a step that is kept: with what was answered
        return {**self.__dict__, "_asked": [], "_listed": self.result()}

    def result(self) -> Listed:
        """[rows, tokens, K]: id -1 where nothing is known, beside and at the end of documents.

        Raises:
            ServerError: see `Server`, or a reply that is no answer to them.
        """
        if self._listed is not None:
            return self._listed
        ids = torch.full((*self._shape, self._top_k), -1, dtype=torch.int32)
        log_probs = torch.zeros(*self._shape, self._top_k)
        for group, future in self._asked:
            for document, listed in zip(group, future.result(), strict=True):
                ids[document.row, document.span] = listed.ids
                log_probs[document.row, document.span] = listed.log_probs
        return Listed(ids, log_probs)


def _some(ids: Sequence[int]) -> str:
    shown = ", ".join(map(str, ids[:12]))
    return f"[{shown}{', ...' if len(ids) > 12 else ''}]"

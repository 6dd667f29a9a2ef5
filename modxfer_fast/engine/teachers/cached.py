"""A teacher that answered before: no weights but its head, its answers from a `TeacherCache`."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modxfer_fast.engine.batch import Answer, Batch
from modxfer_fast.engine.features.taps import LayerTaps
from modxfer_fast.kernels.common import Bend
from modxfer_fast.kernels.kd_loss.topk import TeacherTopK
from modxfer_fast.teacher_cache import Document, TeacherCache, documents_of

ANSWERS = "teacher_answers"  # key of a batch
_LISTED = ("topk_ids", "topk_log_probs", "topk_log_tail")


class CachedTeacher:
    """Answers to what a cache holds, with hidden states and its head, or with top-K classes.

    Its answers come with the batches: `collator` reads them where these are made, in the processes
    of a loader ahead of the step that needs them.

    Args:
        cache: or its folder.
        signal: "hidden" or "topk", of a cache that keeps both; None takes the one that it keeps,
            and hidden states of both, which are exact.
        tail: what becomes of classes that are not listed; see `TeacherTopK`.

    Raises:
        CacheError: no whole cache there. ValueError: a signal that it does not keep.
    """

    kind = "causal_lm"
    num_tokens: int | None = None

    def __init__(
        self, cache: TeacherCache | str | Path, signal: str | None = None, tail: str = "bucket"
    ):
        self.cache = cache if isinstance(cache, TeacherCache) else TeacherCache(cache)
        payload = self.cache.payload
        kept = ["hidden"] * (payload.hidden is not None) + ["topk"] * (payload.top_k > 0)
        signal = signal or kept[0]
        if signal not in kept:
            raise ValueError(f"signal: expected one of {', '.join(kept)}, got {signal!r}")
        self.signal, self.tail = signal, tail
        self._head = self.cache.head() if signal == "hidden" else {}
        facts = self.cache.teacher
        self._bend = Bend(facts["logit_scale"], facts["softcap"])

    @property
    def classes(self) -> int:
        return self.cache.teacher["classes"]

    @property
    def is_listed(self) -> bool:
        """Whether likeliest classes are all that is known."""
        return self.signal == "topk"

    def to(self, device: torch.device) -> "CachedTeacher":
        self._head = {name: tensor.to(device) for name, tensor in self._head.items()}
        return self

    def nonfinite_parameters(self) -> list[str]:
        return [name for name, tensor in self._head.items() if not tensor.isfinite().all()]

    def taps(self) -> LayerTaps:
        raise ValueError(
            "teacher: a cache keeps last hidden states or logits, and no states of inner layers, "
            "which hidden_states and relations learn from; use another plan"
        )

    def collator(self, collator: Callable[[list], dict]) -> Callable[[list], dict]:
        """The batches of a collator, with what was answered to them."""
        return Answering(self, collator)

    def answers(self, documents: Iterable[Document], rows: int, length: int) -> dict[str, Tensor]:
        """[rows, length, width] of each tensor of the signal: 0 beside the documents."""
        kept = self.cache.payload.tensors()
        names = [name for name in kept if name.startswith(self.signal)]
        found = {
            name: torch.zeros(rows, length, kept[name][0], dtype=kept[name][1]) for name in names
        }
        for document in documents:
            own = self.cache.read(document)
            for name, whole in found.items():
                whole[document.row, document.span] = own[name]
        return found

    def answer(self, batch: Batch, taps: LayerTaps | None = None) -> Answer:
        if not isinstance(batch.answered, Mapping):
            raise ValueError(
                "teacher: expected batches with its answers; make them by "
                "`CachedTeacher.collator`, as DistillTrainer does"
            )
        if self.signal == "hidden":
            head = self._head["weight"], self._head.get("bias")
            hidden = batch.answered["hidden"].to(head[0].dtype)
            return Answer(hidden, head, bend=self._bend)
        ids, log_probs, log_tail = (batch.answered[name] for name in _LISTED)
        listed = TeacherTopK(ids, log_probs, self.tail, log_tail=log_tail[..., 0])
        # an absent class, -inf, is no sign of a broken teacher
        return Answer(log_probs.masked_fill(ids < 0, 0.0), listed=listed)


def documents_in_rows(batch: dict[str, Any], rows: Tensor | None = None) -> Iterator[Document]:
    """The documents of a batch, or of some of its rows, counted among those."""
    chosen = slice(None) if rows is None else rows
    others = (
        None if batch.get(name) is None else batch[name].cpu()[chosen]
        for name in ("attention_mask", "position_ids")
    )
    return documents_of(batch["input_ids"].cpu()[chosen], *others)


class Answering:
    """A collator around another one, whose batches get a teacher's `answers` to their documents;
    workers of a loader get a copy."""

    def __init__(self, teacher: Any, collator: Callable[[list], dict]):
        self.teacher, self.collator = teacher, collator

    def __call__(self, features: list) -> dict[str, Any]:
        return self.answered(self.collator(features))

    def answered(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch with its answers; one that has them as it is."""
        if ANSWERS in batch:
            return batch
        if "teacher_inputs" in batch:
            raise ValueError(
                "teacher_inputs: expected none with a teacher that answers elsewhere, got some"
            )
        return {**batch, ANSWERS: self.answers(batch)}

    def answers(self, batch: dict[str, Any]) -> Any:
        """To all documents of a batch."""
        ids = batch["input_ids"]
        return self.teacher.answers(documents_in_rows(batch), *ids.shape)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "collator":
            raise AttributeError(name)
        return getattr(self.collator, name)

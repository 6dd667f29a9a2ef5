"""A teacher behind an endpoint: no weights, its likeliest classes come over HTTP."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from modxfer_fast.engine.batch import Answer, Batch
from modxfer_fast.engine.features.taps import LayerTaps
from modxfer_fast.engine.teachers.cached import Answering
from modxfer_fast.kernels.kd_loss.topk import TeacherTopK
from modxfer_fast.serving import Listed, ListedAnswers, Pending
from modxfer_fast.teacher_cache import Document, documents_of


class ServedTeacher:
    """Answers with the top-K classes that a server tells of each token.

    It is asked where batches are made, by `collator`, ahead of the step that needs the answer: with
    the loader of Trainer while the step before is computed, with workers of it as many batches
    ahead as they are. Packed rows are asked about document by document. A batch that comes without
    answers, as what a student has just generated, is asked about when it is needed.

    Args:
        source: who is asked, and how.
        tail: what becomes of classes that are not listed; see `TeacherTopK`.
    """

    kind = "causal_lm"
    num_tokens: int | None = None
    is_listed = True  # likeliest classes are all that is known

    def __init__(self, source: ListedAnswers, tail: str = "bucket"):
        self.source, self.tail = source, tail

    @property
    def classes(self) -> int:
        return self.source.classes

    def to(self, device: torch.device) -> "ServedTeacher":
        return self

    def nonfinite_parameters(self) -> list[str]:
        return []

    def taps(self) -> LayerTaps:
        raise ValueError(
            "teacher: a server tells likeliest classes, and no states of inner layers, which "
            "hidden_states and relations learn from; use another plan"
        )

    def collator(self, collator: Callable[[list], dict]) -> Callable[[list], dict]:
        """The batches of a collator, with what is answered to them."""
        return Answering(self, collator)

    def answers(
        self, documents: Iterable[Document], rows: int, length: int
    ) -> Pending | dict[str, Tensor]:
        """What was asked; in a worker of a loader, from where nothing unfinished can be sent, the
        [rows, length, K] tensors of a `Listed`."""
        worker = get_worker_info()
        if worker is not None:
            self.source.server.processes = worker.num_workers
        pending = Pending(self.source.submit(documents), (rows, length), self.source.top_k)
        return pending if worker is None else pending.result()._asdict()

    def answer(self, batch: Batch, taps: LayerTaps | None = None) -> Answer:
        ids = batch.inputs["input_ids"]
        answered: Any = batch.answered
        if answered is None:
            inputs = (batch.inputs.get(name) for name in ("attention_mask", "position_ids"))
            documents = documents_of(ids.cpu(), *(x if x is None else x.cpu() for x in inputs))
            answered = self.answers(documents, *ids.shape)
        listed = answered.result() if isinstance(answered, Pending) else Listed(**answered)
        listed = Listed(*(tensor.to(ids.device, non_blocking=True) for tensor in listed))
        return Answer(listed.log_probs, listed=TeacherTopK(*listed, tail=self.tail))

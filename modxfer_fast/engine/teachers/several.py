"""Several frozen teachers of one student: the mixture of all, or for each document the one that the
data names.
"""

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from modxfer_fast.data.collator import IGNORE_INDEX, VARLEN
from modxfer_fast.data.facts import FACTS, TEACHER
from modxfer_fast.engine.batch import Answer, Batch, Route, Share, TokenSet
from modxfer_fast.engine.features.taps import LayerTaps
from modxfer_fast.engine.students.protocol import ModelParts
from modxfer_fast.engine.teachers.cached import Answering, CachedTeacher, documents_in_rows
from modxfer_fast.engine.teachers.replica import Teacher
from modxfer_fast.engine.teachers.self_teacher import FILE as SELF_FILE
from modxfer_fast.engine.teachers.self_teacher import SelfDistillation, SelfTeacher
from modxfer_fast.engine.teachers.served import ServedTeacher
from modxfer_fast.kernels.linear_kd_loss.mixture import OF, TeacherHead, TeacherMixture

INDEX = FACTS[TEACHER].key  # keys of a batch
ROWS, COUNTS = "rows_of_teachers", "labels_of_teachers"


class SeveralTeachers:
    """Teachers in any mixture of plans.

    Args:
        teachers: by name, each as `DistillTrainer` takes one. A model becomes a `Teacher`;
            `SelfDistillation` is the teacher of a student once there is one, see `of_student`.
        weights: of each in the mixture, by name; those that are not there have 1.
        of: "probabilities" for the mixture of the teachers' probabilities, by weights that are
            divided by their sum; "losses" for the sum of the losses, each times its weight; "route"
            for the one teacher that each token names, by its number in the order of `teachers`:
            batches then have "teacher_index" [B, T] int64, which counts where there is a label.

    A teacher of a route reads the rows that hold a token of its own. One whose parameters are
    divided over ranks reads a row of each batch on each rank.

    Raises:
        TypeError: another kind of teacher. ValueError: no teacher, or a wrong weight.
    """

    kind = "causal_lm"

    def __init__(
        self,
        teachers: Mapping[str, Any],
        weights: Mapping[str, float] | None = None,
        of: str = "probabilities",
    ):
        if not teachers:
            raise ValueError("teachers: expected at least one, got none")
        if of not in (*OF, "route"):
            raise ValueError(f"of: expected one of {', '.join((*OF, 'route'))}, got {of!r}")
        weights = dict(weights or {})
        if of == "route" and weights:
            raise ValueError("weights: expected none with of='route', got some")
        for name, weight in weights.items():
            if name not in teachers:
                raise ValueError(f"weights: expected names of {', '.join(teachers)}, got {name!r}")
            if not weight > 0:
                raise ValueError(f"weights: expected more than 0 of {name}, got {weight}")
        self.teachers: dict[str, Any] = {}
        for name, given in teachers.items():
            teacher = Teacher.of(given, self.kind, None)
            is_several = isinstance(teacher, SeveralTeachers)
            if is_several or getattr(teacher, "kind", self.kind) != self.kind:
                raise TypeError(
                    f"teachers: expected causal language models, or what answers as one, got "
                    f"{type(given).__name__} for {name}"
                )
            if of == "probabilities" and getattr(teacher, "is_listed", False):
                raise ValueError(
                    f"of: expected losses or route with {name}, of which some classes are known, "
                    "because a mixture of probabilities has those of all; got probabilities"
                )
            self.teachers[name] = teacher
        self.of = of
        self.weights = [float(weights.get(name, 1.0)) for name in self.teachers]

    def of_student(self, student: nn.Module) -> "SeveralTeachers":
        """The same, where those that are the student's own network are that of this one."""
        if len(self._others) == len(self.teachers):
            return self
        made = copy.copy(self)
        made.teachers = {
            name: one.of(student, self.kind) if isinstance(one, SelfDistillation) else one
            for name, one in self.teachers.items()
        }
        return made

    @property
    def _others(self) -> list[Any]:
        """Those that need no student any more."""
        return [one for one in self.teachers.values() if not isinstance(one, SelfDistillation)]

    @property
    def num_tokens(self) -> int | None:
        return next((teacher.num_tokens for teacher in self._others), None)

    @num_tokens.setter
    def num_tokens(self, number: int | None) -> None:
        for teacher in self._others:
            teacher.num_tokens = number

    @property
    def classes(self) -> int | None:
        """That all have; None where all are the student, which is not there yet."""
        return min((teacher.classes for teacher in self._others), default=None)

    def common_classes(self, student: ModelParts) -> int | None:
        """Leading classes that the student and all teachers have.

        Raises:
            ValueError: a teacher's are others.
        """
        common: list[int | None] = []
        for name, teacher in self.teachers.items():
            try:
                common.append(student.common_classes(teacher))
            except ValueError as error:
                raise ValueError(f"teachers.{name}: {error}") from error
        return min((number for number in common if number is not None), default=None)

    def to(self, device: torch.device) -> "SeveralTeachers":
        for teacher in self.teachers.values():
            teacher.to(device)
        return self

    def nonfinite_parameters(self) -> list[str]:
        return [
            f"{name}.{broken}"
            for name, teacher in self.teachers.items()
            for broken in teacher.nonfinite_parameters()
        ]

    def taps(self) -> LayerTaps:
        raise ValueError(
            "teacher: expected one with hidden_states or relations, whose layers are mapped on "
            f"those of the student, got {len(self.teachers)}"
        )

    def collator(
        self, collator: Callable[[list], dict], learns: bool = True
    ) -> Callable[[list], dict]:
        """The batches of a collator, with the rows of each teacher where the data names them, and
        what those say that answer elsewhere.

        Args:
            learns: whether training reads answers: without it no server is asked ahead.
        """
        if self.of == "route":
            collator = _Routing(collator, tuple(self.teachers))
        kinds = CachedTeacher | ServedTeacher if learns else CachedTeacher
        asked = {name: one for name, one in self.teachers.items() if isinstance(one, kinds)}
        numbers = {name: number for number, name in enumerate(self.teachers)}
        if not asked:
            return collator
        return _Answering(asked, numbers if self.of == "route" else None, collator)

    @property
    def is_cached(self) -> bool:
        """Whether one of them answers to nothing new."""
        return any(isinstance(one, CachedTeacher) for one in self.teachers.values())

    @torch.no_grad()
    def answer(self, batch: Batch, taps: LayerTaps | None = None) -> Answer:
        """Their answers as one mixture, or that of the only teacher of a batch."""
        answered: Any = batch.answered or {}
        of_each = [batch._replace(answered=answered.get(name)) for name in self.teachers]
        if self.of != "route":
            pairs = zip(self.teachers.values(), of_each, strict=True)
            return self._mixed([teacher.answer(own) for teacher, own in pairs])
        if batch.route is None:
            raise ValueError(
                f"teacher: expected batches with {INDEX}, the number of each token's teacher; make "
                "them by `SeveralTeachers.collator`, as DistillTrainer does"
            )
        if batch.teacher_inputs is not None:
            raise ValueError("teacher_inputs: expected none with of='route', got some")
        asked = {}
        for number, (teacher, own, rows) in enumerate(
            zip(self.teachers.values(), of_each, batch.route.rows, strict=True)
        ):
            if len(rows):
                asked[number] = _answer_to_rows(teacher, own, rows)
            elif getattr(teacher, "is_collective", False):  # other ranks may ask it
                teacher.answer(_of_rows(batch, slice(1)))
        return _routed(asked, batch.route)

    def _mixed(self, answers: list[Answer]) -> Answer:
        """Of all: those that list classes beside the mixture of those that have a head."""
        pairs = list(zip(answers, self.weights, strict=True))
        whole = [(answer, weight) for answer, weight in pairs if answer.listed is None]
        listed = [Share(answer, weight) for answer, weight in pairs if answer.listed is not None]
        mixed = []
        if whole:
            heads, weights = _heads(answer for answer, _ in whole), [w for _, w in whole]
            mixture = TeacherMixture(heads, weights, self.of)
            mixed.append(Share(Answer(heads[0].hidden, mixture=mixture)))
        return mixed[0].answer if not listed else _of_shares([*mixed, *listed])


def _routed(asked: dict[int, Answer], route: Route) -> Answer:
    """The answers of the teachers with these numbers, each to its own tokens. Those that have a
    head are one mixture."""
    listed = {number: answer for number, answer in asked.items() if answer.listed is not None}
    whole = {number: answer for number, answer in asked.items() if answer.listed is None}
    shares = [_share(route, [number], answer) for number, answer in listed.items()]
    if len(whole) == 1:
        shares += [_share(route, [number], answer) for number, answer in whole.items()]
    elif whole:
        places = torch.zeros_like(route.numbers)  # also of what does not count
        for place, number in enumerate(whole):
            places.masked_fill_(route.numbers == number, place)
        heads = _heads(whole.values())
        answer = Answer(heads[0].hidden, mixture=TeacherMixture(heads, route=places))
        shares.append(_share(route, list(whole), answer))
    return shares[0].answer if len(shares) == 1 else _of_shares(shares)


def _share(route: Route, numbers: list[int], answer: Answer) -> Share:
    tokens = torch.stack([route.numbers == number for number in numbers]).any(0)
    count = None if route.counts is None else sum(route.counts[number] for number in numbers)
    return Share(answer, tokens=TokenSet(tokens, count))


def _of_shares(shares: list[Share]) -> Answer:
    return Answer(shares[0].answer.output, shares=tuple(shares))


def _heads(answers: Iterable[Answer]) -> list[TeacherHead]:
    heads = []
    for answer in answers:
        assert answer.head is not None  # a causal language model has one
        scale, cap, _ = answer.bend
        heads.append(TeacherHead(answer.output, *answer.head, scale, cap))
    return heads


def models_of(teacher: Any) -> dict[str, nn.Module]:
    """The models that a teacher holds, by what they are called in messages."""
    found = {"teacher": teacher}
    if isinstance(teacher, SeveralTeachers):
        found = {f"teacher.{name}": one for name, one in teacher.teachers.items()}
    models = {name: getattr(one, "model", None) for name, one in found.items()}
    return {name: model for name, model in models.items() if isinstance(model, nn.Module)}


def self_teachers(teacher: Any) -> dict[str, SelfTeacher]:
    """Those that are a student's own network, by the file that keeps them beside it."""
    found = {SELF_FILE: teacher}
    if isinstance(teacher, SeveralTeachers):
        stem, ending = SELF_FILE.split(".")
        found = {f"{stem}-{name}.{ending}": one for name, one in teacher.teachers.items()}
    return {file: one for file, one in found.items() if isinstance(one, SelfTeacher)}


class _Routing:
    """A collator around another one, whose batches tell the rows of each teacher.

    They are found on the host, where the batch is made: a step on a GPU waits for no number.
    """

    def __init__(self, collator: Callable[[list], dict], names: tuple[str, ...]):
        self.collator, self.names = collator, names

    def __call__(self, features: list) -> dict[str, Any]:
        batch = self.collator(features)
        if INDEX not in batch:
            raise ValueError(
                f"data_collator: expected {INDEX} [B, T] in its batches, the number of each "
                f"token's teacher among {', '.join(self.names)}; got {', '.join(batch)}"
            )
        index, counts = batch[INDEX], batch["labels"] != IGNORE_INDEX
        wrong = counts & ((index < 0) | (index >= len(self.names)))
        if wrong.any():
            raise ValueError(
                f"{INDEX}: expected numbers in [0, {len(self.names)}), of teachers "
                f"{', '.join(self.names)}; got {index[wrong][0].item()}"
            )
        rows = [
            (counts & (index == number)).any(-1).nonzero().flatten()
            for number in range(len(self.names))
        ]
        if not any(map(len, rows)):  # nothing to learn: one answers all the same
            rows[0] = torch.zeros(1, dtype=torch.int64)
        numbers = range(len(self.names))
        learnt = [int((counts & (index == number)).sum()) for number in numbers]
        return {**batch, ROWS: rows, COUNTS: learnt}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "collator":
            raise AttributeError(name)
        return getattr(self.collator, name)


class _Answering(Answering):
    """A collator whose batches get, by the names of teachers that answer elsewhere, what each says
    to the documents that are learnt from it."""

    def __init__(
        self,
        teachers: Mapping[str, Any],
        numbers: Mapping[str, int] | None,
        collator: Callable[[list], dict],
    ):
        super().__init__(teachers, collator)
        self.numbers = numbers  # of a route

    def answers(self, batch: dict[str, Any]) -> dict[str, Any]:
        size, length = batch["input_ids"].shape
        found = {}
        for name, teacher in self.teacher.items():
            if self.numbers is None:
                found[name] = teacher.answers(documents_in_rows(batch), size, length)
                continue
            number = self.numbers[name]
            rows = batch[ROWS][number].cpu()
            own = ((batch[INDEX] == number) & (batch["labels"] != IGNORE_INDEX)).cpu()[rows]
            documents = [d for d in documents_in_rows(batch, rows) if own[d.row, d.span].any()]
            if len(rows):
                found[name] = teacher.answers(documents, len(rows), length)
        return found


def _of_rows(batch: Batch, rows: Tensor | slice) -> Batch:
    """What a teacher reads of some rows."""
    inputs = {
        name: value[rows] if isinstance(value, Tensor) else value
        for name, value in batch.inputs.items()
        if name not in VARLEN  # of documents of all rows; positions tell them too
    }
    return Batch(inputs, answered=batch.answered)


def _answer_to_rows(teacher: Any, batch: Batch, rows: Tensor) -> Answer:
    """The answer to a batch, 0 in the rows that the teacher is not asked about."""
    size = len(batch.inputs["input_ids"])
    if len(rows) == size:
        return teacher.answer(batch)
    answer = teacher.answer(_of_rows(batch, rows))

    def whole(tensor: Tensor, beside: int = 0) -> Tensor:
        made = tensor.new_full((size, *tensor.shape[1:]), beside)
        return made.index_copy_(0, rows, tensor)

    listed = answer.listed
    if listed is not None:
        tail = None if listed.log_tail is None else whole(listed.log_tail)
        ids, log_probs = whole(listed.ids, -1), whole(listed.log_probs)
        listed = listed._replace(ids=ids, log_probs=log_probs, log_tail=tail)
    return answer._replace(output=whole(answer.output), listed=listed)

"""One micro-batch on its way through the engine: what is read, what a model answers, what it costs.

A kind of student (students/) reads what a collator made into a `Batch`; student and teacher each
turn it into an `Answer`; the losses turn two answers into `Terms`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from modxfer_fast.engine.features.taps import LayerStates
from modxfer_fast.kernels.common import Bend
from modxfer_fast.kernels.kd_loss.topk import TeacherTopK
from modxfer_fast.kernels.linear_kd_loss.mixture import TeacherMixture
from modxfer_fast.serving import Pending


class TokenSet(NamedTuple):
    """Which tokens of a micro-batch count; one of `mask` and `num_valid` is given.

    Attributes:
        mask: bool, True where a token counts; None for all.
        num_valid: number of them, if known on the host.
        normalizer: number of them in the optimiser step, over all ranks; None for the mean here.
        weights: [B, T] factors of their losses, which do not enter the normalizer; None for 1.
    """

    mask: Tensor | None
    num_valid: int | None
    normalizer: Tensor | float | None = None
    weights: Tensor | None = None

    def number(self, device: torch.device) -> Tensor:
        """Number of tokens that count here, an fp64 scalar."""
        if self.num_valid is None and self.mask is not None:
            return self.mask.sum().double()
        return torch.full((), self.num_valid or 0, dtype=torch.float64, device=device)


class Route(NamedTuple):
    """Which of several teachers each token is learnt from.

    Attributes:
        numbers: [B, T] int64, of the teacher; of tokens that count.
        rows: of each teacher, [n] int64: the rows that hold such a token.
        counts: of each teacher, how many tokens; None where the host does not know.
    """

    numbers: Tensor
    rows: Sequence[Tensor]
    counts: Sequence[int] | None = None


class Batch(NamedTuple):
    """A micro-batch, as a kind of student reads it.

    Attributes:
        inputs: of the student's model, input_ids [B, T] among them.
        compared: what the outputs of the two models are compared on; by default nothing.
        tokens: what their hidden states and relations are compared on; by default nothing.
        labelled: what has a label; None for kinds without logits.
        labels: of each row of the student's output, -100 where there is none.
        num_tokens: tokens that are no padding.
        teacher_inputs: of the teacher's model; None where they are the student's.
        rows, teacher_rows: [n] int64 indices b * T + t of the tokens that are compared; None for
            all, and those of the student where the teacher has none of its own. Of a causal
            language model whose teacher reads other prompts [B, T], for each position.
        answered: what a teacher that answered before said to these inputs, by name, or what one
            was asked that has not answered yet.
        route: to the teachers, where the data names them.
    """

    inputs: Mapping[str, Any]
    compared: TokenSet = TokenSet(None, 0)
    tokens: TokenSet = TokenSet(None, 0)
    labelled: TokenSet | None = None
    labels: Tensor | None = None
    num_tokens: Tensor | int = 0
    teacher_inputs: Mapping[str, Any] | None = None
    rows: Tensor | None = None
    teacher_rows: Tensor | None = None
    answered: Mapping[str, Tensor] | Pending | None = None
    route: Route | None = None

    @property
    def for_teacher(self) -> tuple[Mapping[str, Any], Tensor | None]:
        """Inputs of the teacher's model, and its rows."""
        inputs = self.inputs if self.teacher_inputs is None else self.teacher_inputs
        return inputs, self.rows if self.teacher_rows is None else self.teacher_rows


class Answer(NamedTuple):
    """What a model answers to a micro-batch.

    Attributes:
        output: last hidden states [B, T, D], or the logits [n, C] of a classifier; of a teacher of
            listed classes their log-probabilities [B, T, K]; of several teachers that of the first.
        head: weight [V, D] and bias [V] or None, which make logits of hidden states; None where
            there is no head, or where `output` is logits already.
        bend: what the model does to those logits.
        states: of the layers that were asked for.
        listed: what a teacher of listed classes says.
        mixture: hidden states [B, T, D] and heads of several teachers.
        shares: of several teachers that one loss cannot be had of, in the place of everything else.
    """

    output: Tensor
    head: tuple[Tensor, Tensor | None] | None = None
    states: LayerStates = LayerStates()
    bend: Bend = Bend()
    listed: TeacherTopK | None = None
    mixture: TeacherMixture | None = None
    shares: Sequence["Share"] = ()

    def is_finite(self) -> Tensor:
        """[B, T] bool; of several teachers whether those are that a token is learnt from."""
        if self.shares:
            return torch.stack([share.is_finite() for share in self.shares]).all(0)
        if self.mixture is None:
            return self.output.isfinite().all(-1)
        each = torch.stack([one.hidden.isfinite().all(-1) for one in self.mixture.teachers])
        if self.mixture.route is None:
            return each.all(0)
        return each.gather(0, self.mixture.route[None])[0]

    def leading(self, num_classes: int | None) -> "Answer":
        """With a head of the first classes, views, where the others' gradient is then zero; of
        all without a number. Of listed classes the others are absent."""
        if self.shares:
            shares = [s._replace(answer=s.answer.leading(num_classes)) for s in self.shares]
            return self._replace(shares=shares)
        if self.listed is not None and num_classes is not None:
            ids = self.listed.ids
            listed = self.listed._replace(ids=ids.masked_fill(ids >= num_classes, -1))
            return self._replace(listed=listed)
        if self.mixture is not None and num_classes is not None:
            teachers = [
                replace(one, weight=one.weight[:num_classes], bias=_leading(one.bias, num_classes))
                for one in self.mixture.teachers
            ]
            return self._replace(mixture=replace(self.mixture, teachers=teachers))
        if self.head is None or num_classes is None or num_classes >= len(self.head[0]):
            return self
        weight, bias = self.head
        return self._replace(head=(weight[:num_classes], _leading(bias, num_classes)))


class Share(NamedTuple):
    """What some of several teachers answer.

    Attributes:
        answer: of them. weight: of the loss that it makes.
        tokens: [B, T] mask of those that are learnt from it, and their number; None for all.
    """

    answer: Answer
    weight: float = 1.0
    tokens: TokenSet | None = None

    def is_finite(self) -> Tensor:
        """[B, T] bool; of tokens that others answer to True."""
        found = self.answer.is_finite()
        if self.tokens is None or self.tokens.mask is None:
            return found
        return found | ~self.tokens.mask


def _leading(bias: Tensor | None, num_classes: int) -> Tensor | None:
    return None if bias is None else bias[:num_classes]


class Terms(NamedTuple):
    """What losses of a micro-batch came to.

    Attributes:
        loss: scalar, their weighted sum.
        sums: {name in the logs: (sum over tokens, number of tokens)}, fp64 scalars, detached.
    """

    loss: Tensor
    sums: dict[str, tuple[Tensor, Tensor]]

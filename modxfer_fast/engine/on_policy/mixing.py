"""Which micro-batches are replaced by what the student writes, and what becomes of it.

Whether one is, is drawn from the seed and the window of `reuse` steps: all ranks replace the same
ones, and a resumed run does as it would have. What is written is drawn from the seed, the rank and
the step. Only completions that are still to be used again have to be kept in a checkpoint.
"""

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modxfer_fast.config import OnPolicySection
from modxfer_fast.data.collator import IGNORE_INDEX
from modxfer_fast.data.facts import FACTS, OF_TEACHER
from modxfer_fast.engine.on_policy.rollouts import Rollouts, Sampling, StatefulRollouts, Tokens
from modxfer_fast.engine.teachers.cached import ANSWERS

ON_POLICY = "on_policy"  # key of a batch, whose texts the student wrote
Batch = dict[str, Any]


class OnPolicy:
    """Replaces micro-batches of optimiser steps.

    Args:
        section: how often, and how long completions are used.
        sampling: how they are drawn.
        rollouts: who writes them.
        collate: makes a batch of rows {"input_ids", "is_target", "lengths"}, one document each.
        seed, rank: of the run, of this process.
        answered: asks a teacher that is asked ahead about a batch; one that was asked about stays.
    """

    def __init__(
        self,
        section: OnPolicySection,
        sampling: Sampling,
        rollouts: Rollouts,
        collate: Callable[[list[dict]], Batch],
        seed: int,
        rank: int,
        answered: Callable[[Batch], Batch],
    ):
        self.section, self.sampling, self.rollouts = section, sampling, rollouts
        self._collate, self._seed, self._rank = collate, seed, rank
        self._answered = answered
        self._window: int | None = None  # whose completions are at hand
        self._written: dict[int, Batch] = {}  # by the place of their micro-batch in a step
        self.restart()

    def restart(self, counted: tuple[float, ...] = (0, 0, 0, 0, 0.0)) -> None:
        """Begins new measurements, or goes on from what was `counted`."""
        self._batches, self._replaced, self._completions, self._tokens, self.seconds = counted

    @property
    def counted(self) -> tuple[float, ...]:
        """Since `restart`: micro-batches, those replaced, completions, their tokens, and seconds of
        generation."""
        return self._batches, self._replaced, self._completions, self._tokens, self.seconds

    def mixed(self, batches: list[Batch], step: int) -> list[Batch]:
        """The micro-batches of a step, some of them replaced. Collective.

        Args:
            step: updates before it.

        Raises:
            ValueError: rows of several documents, or a prompt without room behind it.
        """
        window = step // self.section.reuse
        places = [i for i in range(len(batches)) if self._is_replaced(window, i)]
        if window != self._window:
            self._window, self._written = window, {}
        # of the data only what is learnt is asked about, and that while the student writes
        learnt = {i: self._answered(b) for i, b in enumerate(batches) if i not in places}
        missing = [i for i in places if i not in self._written]
        if missing:  # the first step of a window, or one that has more micro-batches than that
            self._written |= self._write({i: batches[i] for i in missing}, step)
        self._written = {i: self._answered(b) for i, b in self._written.items()}
        self._batches += len(batches)
        self._replaced += len(places)
        mixed = [learnt[i] if i in learnt else self._written[i] for i in range(len(batches))]
        if (step + 1) % self.section.reuse == 0:
            self._window, self._written = None, {}
        return mixed

    def _is_replaced(self, window: int, place: int) -> bool:
        draw = random.Random(f"{self._seed} {window} {place}").random()
        return draw < self.section.fraction

    def _write(self, batches: dict[int, Batch], step: int) -> dict[int, Batch]:
        began = time.perf_counter()
        prompts = {i: prompts_of(b, self.section.prompt_length) for i, b in batches.items()}
        seed = random.Random(f"{self._seed} {step} {self._rank}").getrandbits(63)
        asked = [prompt for each in prompts.values() for prompt in each]
        others = [o for i, b in batches.items() for o in teacher_prompts_of(b, prompts[i])]
        written = self.rollouts.generate(asked, self.sampling, seed=seed, step=step)
        written = [
            completion if other is None else self.sampling.cut(other, completion)
            for other, completion in zip(others, written, strict=True)
        ]
        self.seconds += time.perf_counter() - began
        self._completions += len(written)
        self._tokens += sum(map(len, written))
        facts = [fact for batch in batches.values() for fact in facts_of_rows(batch)]
        rows = iter([_row(*each) for each in zip(asked, others, written, facts, strict=True)])
        return {
            i: {**self._collate([next(rows) for _ in each]), ON_POLICY: True}
            for i, each in prompts.items()
        }

    def measurements(self, reduce: Callable[[Tensor], Tensor], device) -> dict[str, float]:
        """Figures since `restart`: the share of micro-batches that were replaced, and of what was
        written its mean length, the tokens a second over all ranks, and this rank's seconds.

        Args:
            reduce: sums a tensor over the ranks.
        """
        counts = torch.tensor([self._completions, self._tokens], dtype=torch.float64)
        completions, tokens = reduce(counts.to(device)).tolist()
        figures = {"on_policy_share": self._replaced / max(self._batches, 1)}
        if completions:
            figures["completion_length"] = tokens / completions
            figures["generation_s"] = round(self.seconds, 3)
            figures["generated_tokens_per_s"] = round(tokens / max(self.seconds, 1e-9), 1)
        return figures

    # ---- checkpoints ----

    def save(self, folder: str | Path) -> None:
        """Writes the completions that the next step uses again, where there are any, and what
        `rollouts` keeps."""
        if self._written:
            # a server that was asked about them is asked again
            written = {
                place: {key: value for key, value in batch.items() if key != ANSWERS}
                for place, batch in self._written.items()
            }
            kept = {"window": self._window, "written": written}
            torch.save(kept, _file(folder, self._rank))
        if isinstance(self.rollouts, StatefulRollouts):
            self.rollouts.save(folder)

    def load(self, folder: str | Path) -> None:
        """Reads what `save` wrote; without it the next step writes anew."""
        self._window, self._written = None, {}
        file = _file(folder, self._rank)
        if file.is_file():
            kept = torch.load(file, map_location="cpu", weights_only=True)
            self._window, self._written = kept["window"], kept["written"]
        if isinstance(self.rollouts, StatefulRollouts):
            self.rollouts.load(folder)

    def end(self) -> None:
        """Training has ended. Collective."""
        if isinstance(self.rollouts, StatefulRollouts):
            self.rollouts.end()


def _file(folder: str | Path, rank: int) -> Path:
    return Path(folder) / f"rollouts_{rank}.pt"


def _row(
    prompt: Tokens, of_teacher: Tokens | None, completion: Tokens, facts: dict[str, list]
) -> dict[str, list]:
    ids, is_target = _joined(prompt, completion)
    row: dict[str, list] = {
        "input_ids": ids,
        "is_target": is_target,
        "lengths": [len(ids)],
        **facts,
    }
    if of_teacher is not None:
        joined = _joined(of_teacher, completion)
        row |= {**dict(zip(OF_TEACHER, joined, strict=True)), "teacher_lengths": [len(joined[0])]}
    return row


def _joined(prompt: Tokens, completion: Tokens) -> tuple[Tokens, list[bool]]:
    return prompt + completion, [False] * len(prompt) + [True] * len(completion)


def facts_of_rows(batch: Batch) -> list[dict[str, list]]:
    """The facts of each row of one document (data/facts.py), as columns of rows."""
    mask = _mask(batch)
    first = mask.int().argmax(-1, keepdim=True)
    values = {
        column: batch[fact.key].gather(1, first).tolist()
        for column, fact in FACTS.items()
        if fact.key in batch
    }
    return [{name: of[i] for name, of in values.items()} for i in range(len(mask))]


def prompts_of(batch: Batch, prompt_length: int | None) -> list[Tokens]:
    """What precedes the last run of targets of each row, at least its first token.

    Args:
        batch: with labels of the position before each target, one document a row.
        prompt_length: of rows whose targets begin with the second token: tokens of the prompt, as
            far as one is left behind it.

    Raises:
        ValueError: a row may hold several documents.
    """
    if batch.get("position_ids") is not None:
        raise ValueError(
            "on_policy: expected rows of one document each, got position_ids; use a collator that "
            "does not pack"
        )
    rows = zip(batch["input_ids"], batch["labels"], _mask(batch), strict=True)
    return [prompt_of(i[m].tolist(), t[m].tolist(), prompt_length) for i, t, m in rows]


def teacher_prompts_of(batch: Batch, prompts: list[Tokens]) -> list[Tokens | None]:
    """What the teacher reads of each row before the token that comes behind the student's prompt;
    None where it reads what the student does."""
    inputs = batch.get("teacher_inputs")
    if inputs is None:
        return [None] * len(prompts)
    ids, mask = inputs["input_ids"], _mask(inputs)
    rows = torch.arange(len(prompts))
    last = _mask(batch).cpu().int().argmax(-1) + torch.tensor(list(map(len, prompts))) - 1
    places = batch["teacher_rows"].cpu()[rows, last] - rows * ids.shape[1]
    is_target = batch["labels"].cpu()[rows, last] != IGNORE_INDEX
    ends = torch.where(is_target, places, ids.shape[1] - 1).tolist()  # else nothing is learnt
    return [i[: end + 1][m[: end + 1]].tolist() for i, m, end in zip(ids, mask, ends, strict=True)]


def _mask(inputs: Batch) -> Tensor:
    """[B, T] bool, of what is no padding."""
    mask = inputs.get("attention_mask")
    return torch.ones_like(inputs["input_ids"]).bool() if mask is None else mask.bool()


def prompt_of(tokens: Tokens, labels: list[int], prompt_length: int | None) -> Tokens:
    """The same of one document, without padding."""
    learnt = [label != IGNORE_INDEX for label in labels]
    end = max((t for t, target in enumerate(learnt) if target), default=len(learnt) - 1)
    start = end
    while start and learnt[start - 1]:
        start -= 1
    if start == 0 and prompt_length is not None:
        start = min(prompt_length, len(tokens) - 1) - 1
    return tokens[: max(start, 0) + 1]

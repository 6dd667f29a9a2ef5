"""Where completions come from: the student in this process, or whoever has its weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

Tokens = list[int]


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn.

    max_new_tokens: of a completion. max_length: of prompt and completion together.
    temperature: 0 takes the likeliest token. top_p, top_k: 1 and 0 keep all tokens.
    stop: ids that end a completion, and belong to it.
    num_classes: ids below it may be drawn; None for all.
    """

    max_new_tokens: int
    max_length: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[int, ...] = ()
    num_classes: int | None = None

    def room(self, prompt: Tokens) -> int:
        """Tokens that a completion of `prompt` may have, at least 1.

        Raises:
            ValueError: the prompt fills `max_length`.
        """
        room = min(self.max_new_tokens, self.max_length - len(prompt))
        if room < 1:
            raise ValueError(
                f"on_policy.max_length: expected more than the {len(prompt)} tokens of a prompt, "
                f"got {self.max_length}"
            )
        return room

    def cut(self, prompt: Tokens, completion: Tokens) -> Tokens:
        """The beginning of `completion` that has room, up to its first token of `stop`."""
        kept = completion[: self.room(prompt)]
        ends = [i for i, token in enumerate(kept) if token in self.stop]
        return kept[: ends[0] + 1] if ends else kept


@runtime_checkable
class Rollouts(Protocol):
    """Completes prompts as the student of now would."""

    def generate(
        self, prompts: list[Tokens], sampling: Sampling, *, seed: int, step: int
    ) -> list[Tokens]:
        """A completion of each prompt, of 1 to `sampling.room(prompt)` tokens, without the prompt.

        All ranks call together, each with prompts of its own, as many as every other rank.

        Args:
            seed: another one for every rank and step, the same when a step is repeated.
            step: updates that the student has had.
        """


@runtime_checkable
class StatefulRollouts(Rollouts, Protocol):
    """Rollouts with something to keep between steps, and to give back. All ranks call together."""

    def save(self, folder: str | Path) -> None:
        """Keeps in a checkpoint what steps to come need."""

    def load(self, folder: str | Path) -> None:
        """Takes up what `save` kept there, if anything."""

    def end(self) -> None:
        """Training has ended; it may begin again."""

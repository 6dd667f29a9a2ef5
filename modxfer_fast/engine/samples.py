"""Texts to look at: what student and teacher make of a few held-out prompts, at each evaluation."""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

from transformers import TrainerCallback
from transformers.trainer_utils import has_length

from modxfer_fast.engine import deepspeed
from modxfer_fast.engine.config import DistillConfig
from modxfer_fast.engine.module import DistillModule
from modxfer_fast.engine.on_policy.generation import complete, in_eval_mode, stop_tokens
from modxfer_fast.engine.on_policy.mixing import prompt_of
from modxfer_fast.engine.on_policy.rollouts import Sampling, Tokens
from modxfer_fast.engine.teachers.protocol import TeacherProtocol
from modxfer_fast.engine.teachers.replica import Teacher
from modxfer_fast.engine.teachers.sharded import ShardedTeacher
from modxfer_fast.files import write_text
from modxfer_fast.models.architecture import max_tokens, without_peft
from modxfer_fast.teacher_cache import Document, documents_of

SAMPLES_FILE = "samples.jsonl"
PROMPT_LENGTH = 32  # of plain text, where nothing says how long its prompts are


class Sample(NamedTuple):
    """A held-out prompt, how its document goes on, and what the models write, likeliest tokens.

    teacher: None where the teacher has no model that writes.
    """

    prompt: str
    reference: str
    student: str
    teacher: str | None


class SampleWriter(TrainerCallback):
    """Writes a line for each sample, {"step", "prompt", "reference", "student", "teacher"}, to
    samples.jsonl in the output folder, and shows them to callbacks that have `on_samples`, and to
    TensorBoard where it is reported to. All ranks take part; the main process writes.

    Args:
        module: whose student and teacher write.
        eval_dataset: its first rows hold the prompts, or those of the first of several; of a row of
            several documents the first is taken.
        collator: makes batches of its rows.
        tokenizer: of both models.
        args: say how many samples, and how long they are.
        callbacks: gives those of the trainer. outside: opens a context of time that is no training.
        autocast: opens the context that the student computes in.

    Raises:
        ValueError: no tokenizer, or no dataset with a length.
    """

    def __init__(
        self,
        module: DistillModule,
        eval_dataset: Any,
        collator: Callable[[list], dict[str, Any]],
        tokenizer: Any,
        args: DistillConfig,
        callbacks: Callable[[], list[TrainerCallback]],
        outside: Callable[[], AbstractContextManager],
        autocast: Callable[[], AbstractContextManager],
    ):
        if not hasattr(tokenizer, "decode"):
            raise ValueError("processing_class: expected a tokenizer, with eval_samples, got none")
        rows = eval_dataset
        if isinstance(rows, dict):
            rows = next(iter(rows.values()), None)
        if rows is None or not has_length(rows):
            raise ValueError("eval_dataset: expected one with a length, with eval_samples")
        batches = [collator([rows[i]]) for i in range(min(args.eval_samples, len(rows)))]
        documents = [each for batch in batches for each in _first_documents(batch)]
        on_policy = args.on_policy_options()
        length = (on_policy and on_policy.prompt_length) or PROMPT_LENGTH
        self._prompts = [prompt_of(*document, length) for document in documents]
        self._references = [
            ids[len(prompt) :] for (ids, _), prompt in zip(documents, self._prompts, strict=True)
        ]
        base = without_peft(module.student)
        room = max(map(len, self._prompts)) + args.eval_sample_tokens
        self._sampling = Sampling(
            args.eval_sample_tokens,
            min(room, max_tokens(base.config.get_text_config()) or room),
            temperature=0.0,
            stop=stop_tokens(base, tokenizer),
            num_classes=module.common_classes(len(tokenizer)),
        )
        self._module, self._tokenizer = module, tokenizer
        self._callbacks, self._outside, self._autocast = callbacks, outside, autocast
        self._of_teacher: list[Tokens] | None = None  # it does not change
        self._last: int | None = None  # step of the last samples

    def on_train_begin(self, args, state, control, **kwargs):
        """A resumed run takes back what an interrupted one wrote after its checkpoint."""
        file = Path(args.output_dir) / SAMPLES_FILE
        self._last = None
        if state.is_world_process_zero and file.is_file():
            lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if json.loads(line)["step"] <= state.global_step]
            write_text(file, "".join(kept))

    def on_evaluate(self, args, state, control, **kwargs):
        if state.global_step == self._last:  # of another set
            return
        self._last = state.global_step
        is_main = state.is_world_process_zero
        with self._outside():
            samples = self.samples(is_main)
        if not is_main:
            return
        file = Path(args.output_dir) / SAMPLES_FILE
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8") as lines:
            for sample in samples:
                fields = {"step": state.global_step, **sample._asdict()}
                lines.write(json.dumps(fields, ensure_ascii=False) + "\n")
        for callback in self._callbacks():
            if hasattr(callback, "on_samples"):
                callback.on_samples(state.global_step, samples)
            writer = getattr(callback, "tb_writer", None)
            if writer is not None:
                writer.add_text("samples", _markdown(samples), state.global_step)

    def samples(self, keep: bool) -> list[Sample]:
        """What the models write now; empty unless `keep`. Collective."""
        student, teacher, written = self._module.student, self._module.teacher, []
        with in_eval_mode(student), deepspeed.whole(student), self._autocast():
            if keep:
                written = complete(student, self._prompts, self._sampling)
        if self._of_teacher is None and teacher is not None:
            self._of_teacher = self._taught(teacher, keep)
        theirs: list[Any] = self._of_teacher or [None] * len(written)
        rows = zip(self._prompts, self._references, written, theirs, strict=True) if keep else ()
        text = self._text
        return [
            Sample(text(prompt), text(reference), text(own), None if its is None else text(its))
            for prompt, reference, own, its in rows
        ]

    def _taught(self, teacher: TeacherProtocol, keep: bool) -> list[Tokens]:
        if isinstance(teacher, ShardedTeacher):
            with deepspeed.gathered_on_call(teacher.model):
                return complete(teacher.model, self._prompts, self._sampling, synced=True)
        if isinstance(teacher, Teacher) and keep:
            return complete(teacher.model, self._prompts, self._sampling)
        return []

    def _text(self, tokens: Tokens) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True)


def _first_documents(batch: dict[str, Any]) -> list[tuple[Tokens, list[int]]]:
    """Ids and labels of the first document of each row."""
    first: dict[int, Document] = {}
    inputs = (batch.get(name) for name in ("attention_mask", "position_ids"))
    for document in documents_of(batch["input_ids"], *inputs):
        first.setdefault(document.row, document)
    labels = batch["labels"]
    return [(d.ids.tolist(), labels[d.row, d.span].tolist()) for d in first.values()]


def _markdown(samples: list[Sample]) -> str:
    def cell(text: str | None) -> str:
        return (text or "").replace("|", "\\|").replace("\n", "<br>")

    rows = [" | ".join(map(cell, sample)) for sample in samples]
    return "\n".join([" | ".join(Sample._fields), " | ".join(["---"] * 4), *rows])

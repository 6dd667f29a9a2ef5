"""`modxfer cache`: the data of a `modxfer distill` job, its teacher, and what that answers."""

from typing import Any

import torch
from transformers import PreTrainedModel

from modxfer_fast.config import ConfigError
from modxfer_fast.engine import ServedTeacher, Teacher, deepspeed
from modxfer_fast.engine.students.causal_lm import SplitCausalLM
from modxfer_fast.jobs.cache.capture import capture, check_told
from modxfer_fast.jobs.cache.identity import cache_folder, documents_for, teacher_facts
from modxfer_fast.jobs.distill.job import DistillJob
from modxfer_fast.jobs.distill.models import ModelSource
from modxfer_fast.jobs.distill.served import open_served
from modxfer_fast.jobs.job import quieten_libraries
from modxfer_fast.jobs.ranks import barrier, end_with_launcher, on_main, rank, world_size
from modxfer_fast.jobs.threads import settle_threads
from modxfer_fast.teacher_cache import Document, Payload, TeacherCache


class CacheJob(DistillJob):
    """Asks the teacher of a job for the documents that its cache lacks; of several each for those
    that are learnt from it, but the student itself, which changes.

    Data, tokenizer and teachers are those of the job. A run that is interrupted goes on behind its
    last whole shard; processes of a launcher share the shards.
    """

    command = "modxfer cache"

    def check(self) -> None:
        super().check()
        if self.config.kind != "causal_lm":
            raise ConfigError(
                f"kind: expected causal_lm, whose last hidden states a cache keeps, "
                f"got {self.config.kind}"
            )
        if self.config.data.streaming:
            raise ConfigError("data.streaming: expected false, because a cache is filled before")
        if all(section.is_student for section in self.config.teacher_sections.values()):
            raise ConfigError(
                "teacher.plan: expected a teacher that stays as it is, got self, whose student "
                "changes"
            )

    def run(self, *, until: str | None = None, resume: bool = False) -> dict[str, Any]:
        """Fills the cache.

        Returns:
            folder, documents, tokens, bytes_per_token, and how many documents were asked for now;
            of several "teachers", the same by name.
        """
        quieten_libraries()
        self.check()
        end_with_launcher()
        console = self.console
        device = self.open_process_group()
        settle_threads(console.say)
        with console.phase("Data"):
            sections = self.config.teacher_sections.items()
            asked = {
                role: documents_for(self.config, self.material.rows, role)
                for role, section in sections
                if not section.is_student
            }
        made = {role: self._fill(role, each, device) for role, each in asked.items()}
        if self.config.teachers is None:
            return made["teacher"]
        return {"teachers": {role.partition(".")[2]: each for role, each in made.items()}}

    def _fill(self, role: str, documents: list[Document], device: torch.device) -> dict[str, Any]:
        """The cache of one teacher."""
        console = self.console
        with console.phase("Teacher" if role == "teacher" else role):
            source = self.teacher_source(role)
            teacher = self._teacher(source, role)
        with console.phase("Answers"), console.progress(len(documents)) as tell:
            self._create(role, source, teacher, documents)
            cache = TeacherCache(cache_folder(self.config, role))
            barrier()  # before one of them writes into it
            asked = capture(
                cache,
                documents,
                teacher,
                batch_tokens=self._batch_tokens(),
                device=device,
                part=(rank(), world_size()),
                tell=tell,
            )
            barrier()
        cache = TeacherCache(cache.folder)  # with what the others wrote
        report = {
            "folder": str(cache.folder),
            "documents": len(cache),
            "tokens": cache.num_tokens,
            "bytes_per_token": cache.payload.bytes_per_token(),
            "asked": asked,
        }
        console.say(
            f"{report['documents']:,} documents, {report['tokens']:,} tokens of "
            f"{report['bytes_per_token']:,} bytes in {cache.folder}"
        )
        return report

    def _teacher(self, source: ModelSource, role: str) -> Teacher | ServedTeacher:
        if self.config.teacher_sections[role].served is not None:
            return open_served(self.config, self.material, role)
        return self.make_teacher(self.load_teacher(source, role), role)

    def _create(
        self,
        role: str,
        source: ModelSource,
        teacher: Teacher | ServedTeacher,
        documents: list[Document],
    ) -> None:
        """Of all processes; the main one writes."""
        if isinstance(teacher, ServedTeacher):
            on_main(lambda: self._create_told(role, source, teacher, documents))
            return
        head = SplitCausalLM.of(teacher.model, "teacher").head
        with deepspeed.gathered(head.parameters()):
            on_main(lambda: self._create_kept(role, source, teacher.model))

    def _create_kept(self, role: str, source: ModelSource, model: PreTrainedModel) -> None:
        section = self.config.teacher_sections[role].cache
        parts = SplitCausalLM.of(model, "teacher")
        hidden = None
        if section.hidden:
            hidden = section.dtype or str(parts.head.weight.dtype).removeprefix("torch.")
        width = parts.head.weight.shape[1] if hidden else 0
        self.create(source, model, Payload(hidden, width, section.top_k), role)

    def _create_told(
        self, role: str, source: ModelSource, teacher: ServedTeacher, documents: list[Document]
    ) -> None:
        section = self.config.teacher_sections[role]
        facts = {
            **teacher_facts(source, section, self.material.tokenizer),
            "classes": teacher.classes,
            "logit_scale": 1.0,
            "softcap": None,
        }
        payload = Payload(top_k=teacher.source.top_k)
        cache = TeacherCache.create(cache_folder(self.config, role), payload, facts, {})
        # a name does not tell whether it stands for the weights that it stood for
        known = (each for each in documents if each.key in cache and len(each.ids) > 1)
        if (document := next(known, None)) is not None:
            check_told(cache, document, teacher)

    def create(
        self,
        source: ModelSource,
        model: PreTrainedModel,
        payload: Payload,
        role: str = "teacher",
    ) -> TeacherCache:
        """The cache of a teacher of the job, made or opened.

        Raises:
            CacheError: the one there is of another teacher or payload.
        """
        parts = SplitCausalLM.of(model, "teacher")
        head = {"weight": parts.head.weight, "bias": parts.head.bias} if payload.hidden else {}
        facts = {
            **teacher_facts(source, self.config.teacher_sections[role], self.material.tokenizer),
            "classes": parts.classes,
            "logit_scale": parts.bend.scale,
            "softcap": parts.bend.cap,
            "model_type": model.config.model_type,
        }
        given = {name: tensor for name, tensor in head.items() if tensor is not None}
        return TeacherCache.create(cache_folder(self.config, role), payload, facts, given)

    def _batch_tokens(self) -> int:
        args = self.evaluation.args()
        return args.per_device_eval_batch_size * self.config.data.max_length

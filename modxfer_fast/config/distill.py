"""A `modxfer distill` job: a language model, or an encoder from unlabelled text."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from modxfer_fast.config.data import DataSection
from modxfer_fast.config.loss import LossSection, check_encoder_loss, check_learns
from modxfer_fast.config.model import (
    MIXTURES,
    OneOfTeachersSection,
    StudentSection,
    TeacherModelSection,
    TokenizerSection,
)
from modxfer_fast.config.on_policy import OnPolicySection
from modxfer_fast.config.section import OneOf, PositiveInt, Section, Seeds, Training


class CompareSection(Section):
    """What to measure beside the distilled student.

    ce_only: train the same student with cross entropy alone, from the same start, on the same
        batches.
    loss_rows: time fused and dense loss on one batch of that many rows; null leaves it out.
    parts: what each part of the job gains. In quality: the same student with cross entropy alone,
        then with the loss of the logits, then with everything. In cost: a step as it is, and with
        each fused part replaced by its plain counterpart, on a batch of `loss_rows` rows or 32.
    """

    ce_only: bool = False
    parts: bool = False
    loss_rows: PositiveInt | None = None
    loss_repeats: PositiveInt = 5


TeacherName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]


class JobConfig(Section):
    """A whole `modxfer distill` job.

    kind: `causal_lm`; or `encoder`, which learns from `loss.hidden_states` on plain text, one a
        row, without logits or labels: where not given, `kd_weight` is then 0, `packing` false and
        `max_length` 512.
    teacher: what the student learns from; or several, as `teachers`.
    teachers: {name: one}. Where `data.teacher_column`, or `teacher` in each of `data.sources`,
        names the teacher of each document, it is learnt from that one; else from the mixture of
        all, by their `weight`.
    mixture_of: `probabilities`, which are averaged by weight, where not given; or `losses`, which
        are summed, each times its weight.
    on_policy: also train on what the student itself writes; null does not. Where not given,
        `packing` is then false.
    """

    kind: Literal["causal_lm", "encoder"] = "causal_lm"
    output_dir: str
    overwrite: bool = False
    seeds: Seeds = [0]
    tokenizer: TokenizerSection | None = None
    data: DataSection
    if TYPE_CHECKING:
        teacher: TeacherModelSection  # None beside teachers, which few readers have to know
    else:
        teacher: TeacherModelSection | None = None
    teachers: Annotated[dict[TeacherName, OneOfTeachersSection], Field(min_length=1)] | None = None
    mixture_of: Annotated[str, OneOf(MIXTURES)] | None = None
    student: StudentSection
    loss: LossSection = LossSection()
    on_policy: OnPolicySection | None = None
    training: Training = {}
    compare: CompareSection = CompareSection()

    @model_validator(mode="before")
    @classmethod
    def _defaults_on_policy(cls, raw: Any) -> Any:
        is_given = isinstance(raw, dict) and raw.get("on_policy") is not None
        if is_given and isinstance(raw.get("data"), dict):
            return {**raw, "data": {"packing": False, **raw["data"]}}
        return raw

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_encoders(cls, raw: Any) -> Any:
        if not isinstance(raw, dict) or raw.get("kind") != "encoder":
            return raw
        raw = dict(raw)
        for name, default in (
            ("data", {"packing": False, "max_length": 512}),
            ("loss", {"kd_weight": 0.0}),
        ):
            if isinstance(raw.get(name), dict):
                raw[name] = {**default, **raw[name]}
        return raw

    @model_validator(mode="after")
    def _consistent(self):
        self._check_teachers()
        if self.kind == "encoder":
            self._check_encoder()
        check_learns(self.loss.weights, self.loss.has_features, "loss.")
        if "self" in self._plans:
            self._check_self()
        elif self.tokenizer is None and all(t.path is None for t in self.teacher_sections.values()):
            raise ValueError(
                "tokenizer: expected a section, because the teacher is not loaded from a path"
            )
        if self.data.streaming:
            self._check_streaming()
        if self._plans & {"cached", "served"}:
            self._check_answered()
        weighs = any(source.loss_weight != 1.0 for source in self.data.sources or ())
        if weighs and self.loss.has_features:
            raise ValueError(
                "data.sources: expected no loss_weight with loss.hidden_states or loss.relations, "
                "whose tokens count alike"
            )
        if self.data.parts[0].teacher_prompt is not None:
            self._check_teacher_prompt()
        if self.on_policy is not None:
            self._check_on_policy(self.on_policy)
        if self.loss.relations is not None and self.data.packing:
            raise ValueError(
                "loss.relations: expected data.packing: false, because a relation spans a row"
            )
        return self

    def _check_teacher_prompt(self) -> None:
        self._refuse(
            "with data.teacher_prompt, whose completions are compared by logits, and whose prompts "
            "only a teacher at hand reads",
            {
                "kind": self.kind != "causal_lm",
                "loss.hidden_states": self.loss.hidden_states is not None,
                "loss.relations": self.loss.relations is not None,
                "data.teacher_column": self.is_routed,
                **{f"teacher.plan: {plan}": plan in self._plans for plan in ("cached", "served")},
                **self._timed,
            },
        )

    @property
    def teacher_sections(self) -> Mapping[str, TeacherModelSection]:
        """Of each teacher, by the path of its section."""
        if self.teachers is None:
            return {"teacher": self.teacher}
        return {f"teachers.{name}": section for name, section in self.teachers.items()}

    @property
    def is_routed(self) -> bool:
        """Whether the data names the teacher of each document."""
        return self.teachers is not None and self.data.parts[0].names_teachers

    @property
    def _plans(self) -> set[str]:
        return {section.plan for section in self.teacher_sections.values()}

    def _check_teachers(self) -> None:
        if (self.teacher is None) == (self.teachers is None):
            got = "neither" if self.teachers is None else "both"
            raise ValueError(f"teacher: expected exactly one of teacher and teachers, got {got}")
        named = [source.label for source in self.data.parts if source.names_teachers]
        if self.teachers is None:
            self._refuse(
                "without teachers",
                {"data.teacher_column": bool(named), "mixture_of": self.mixture_of is not None},
            )
            return
        self._refuse(
            "with teachers, which learn from logits of causal language models alone",
            {
                "kind": self.kind != "causal_lm",
                "loss.hidden_states": self.loss.hidden_states is not None,
                "loss.relations": self.loss.relations is not None,
                "student.from_teacher": self.student.from_teacher is not None,
                **self._timed,
            },
        )
        if self.loss.impl == "dense":
            raise ValueError(
                "loss.impl: expected fused with teachers, got dense, which is of the whole logits "
                "of one teacher"
            )
        if named:
            self._check_routed(self.teachers, named)
            return
        for name, one in self.teachers.items():
            if self.mixture_of != "losses" and one.listed_classes is not None:
                raise ValueError(
                    f"mixture_of: expected losses with teachers.{name}, of which some classes are "
                    "known, because a mixture of probabilities has those of all, got "
                    f"{self.mixture_of or MIXTURES[0]}"
                )
        if self.mixture_of != "losses" and self.loss.is_of_logits:
            raise ValueError(
                "mixture_of: expected losses with a divergence of logits, which a mixture of "
                f"probabilities does not have, got {self.mixture_of or MIXTURES[0]}"
            )

    def _check_routed(self, teachers: Mapping[str, OneOfTeachersSection], named: list[str]) -> None:
        weighs = any(section.weight is not None for section in teachers.values())
        given = {"teachers.weight": weighs, "mixture_of": self.mixture_of is not None}
        self._refuse("where the data names the teacher of each document", given)
        for source in self.data.parts:
            if source.label not in named:
                raise ValueError(
                    f"data.sources: expected a teacher or a teacher_column for each or for none, "
                    f"{source.label} has none"
                )
            if source.teacher is not None and source.teacher not in teachers:
                raise ValueError(
                    f"data.sources: {source.label}: teacher: expected one of "
                    f"{', '.join(teachers)}, got {source.teacher}"
                )

    def _check_on_policy(self, section: OnPolicySection) -> None:
        length = self.data.max_length
        if "cached" in self._plans:
            raise ValueError(
                "teacher.plan: expected one that answers now, with on_policy: what the student "
                "will write is in no cache; got cached"
            )
        if self.data.packing:
            raise ValueError(
                "data.packing: expected false with on_policy, which needs a prompt a row, got true"
            )
        if not self.loss.kd_weight and not self.loss.has_features:
            raise ValueError(
                "loss.kd_weight: expected more than 0 with on_policy, because the teacher alone "
                f"says what is right in a text of the student, got {self.loss.kd_weight}"
            )
        if section.vllm is not None:
            self._check_vllm()
        if section.prompt_length is not None and section.prompt_length >= length:
            raise ValueError(
                f"on_policy.prompt_length: expected less than data.max_length, {length}, got "
                f"{section.prompt_length}"
            )
        if section.max_length is not None and section.max_length < length:
            raise ValueError(
                f"on_policy.max_length: expected at least data.max_length, {length}, whose "
                f"prompts have to fit, got {section.max_length}"
            )

    def _check_vllm(self) -> None:
        """The server has the base of the student before the job begins, and takes LoRA alone."""
        peft = self.student.peft
        if peft is None or peft.get("type", "lora") != "lora":
            raise ValueError(
                "student.peft: expected LoRA with on_policy.vllm, whose weights follow a LoRA "
                f"alone, got {'a student that trains whole' if peft is None else peft['type']}"
            )
        if self.student.is_built:
            raise ValueError(
                "student: expected a path with on_policy.vllm, of the model that is served, got "
                "one that the job builds"
            )

    def _check_streaming(self) -> None:
        trained = {
            "training": self.training,
            **{f"{role}.pretrain": one.pretrain for role, one in self.teacher_sections.items()},
            "student.pretrain": self.student.pretrain,
        }
        for where, section in trained.items():
            steps = 1 if section is None else section.get("max_steps", 0)
            if not isinstance(steps, int) or steps < 1:
                raise ValueError(
                    f"{where}.max_steps: expected a number with data.streaming, which has no end"
                )
        for name, given in (
            ("tokenizer.vocab_size", self.tokenizer is not None and self.tokenizer.vocab_size),
            ("teacher.plan: cached", "cached" in self._plans),
        ):
            if given:
                raise ValueError(
                    f"{name}: expected none with data.streaming; it would read all documents first"
                )

    def _check_answered(self) -> None:
        plans = " or ".join(sorted(self._plans & {"cached", "served"}))
        self._refuse(
            f"with teacher.plan: {plans}, which has last hidden states or listed "
            "classes of a causal language model alone",
            {
                "kind": self.kind != "causal_lm",
                "loss.hidden_states": self.loss.hidden_states is not None,
                "loss.relations": self.loss.relations is not None,
                **self._timed,
            },
        )
        self._refuse(
            "with a section teacher.served, because no weights of the teacher are read",
            {
                "student.from_teacher": self.student.from_teacher is not None
                and any(one.served is not None for one in self.teacher_sections.values())
            },
        )

    def _check_self(self) -> None:
        if self.student.peft is None:
            raise ValueError(
                "student.peft: expected adapters with teacher.plan: self; the start of a student "
                "that trains whole is a teacher with plan: replica"
            )
        sections = (*self.teacher_sections.values(), self.student)
        if self.tokenizer is None and all(section.path is None for section in sections):
            raise ValueError(
                "tokenizer: expected a section, because no model is loaded from a path"
            )
        self._refuse(
            "with teacher.plan: self, which has no model of its own",
            {
                "kind": self.kind != "causal_lm",
                "student.from_teacher": self.student.from_teacher is not None,
                **self._timed,
            },
        )

    @property
    def _timed(self) -> dict[str, bool]:
        """What takes turns with other models on one batch."""
        compare = self.compare
        return {
            "compare.parts": compare.parts,
            "compare.loss_rows": compare.loss_rows is not None,
        }

    def _refuse(self, reason: str, given: dict[str, bool]) -> None:
        for name, is_given in given.items():
            if is_given:
                raise ValueError(f"{name}: expected nothing {reason}")

    def _check_encoder(self) -> None:
        loss = self.loss
        check_encoder_loss(loss.kd_weight, loss.ce_weight, loss.hidden_states, "loss.")
        wrong = "with kind: encoder"
        if self.data.packing:
            raise ValueError(f"data.packing: expected false {wrong}, which sees a whole row")
        for source in self.data.parts:
            if source.format not in ("auto", "text"):
                raise ValueError(f"data.format: expected text {wrong}, got {source.format}")
        if self.tokenizer is not None and self.tokenizer.path is None:
            raise ValueError(f"tokenizer.vocab_size: expected a path {wrong}, or no section")
        if self.teacher.path is None:
            raise ValueError(f"teacher.path: missing; expected a trained model {wrong}")
        for name, given in (
            ("on_policy", self.on_policy is not None),
            ("student.pretrain", self.student.pretrain is not None),
            ("student.peft", self.student.peft is not None),
            ("compare.ce_only", self.compare.ce_only),
            ("compare.parts", self.compare.parts),
            ("compare.loss_rows", self.compare.loss_rows is not None),
        ):
            if given:
                raise ValueError(f"{name}: expected nothing {wrong}")

"""The sections of a `modxfer transfer` job: a module, and the models that it moves between."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from modxfer_fast.config import transfer_names as names
from modxfer_fast.config.loss import DivergenceSection
from modxfer_fast.config.model import PretrainedSection
from modxfer_fast.config.section import NotNegative, OneOf, PositiveInt, Section, Seed, Training
from modxfer_fast.config.task import TaskSection

FRESH = "fresh"  # the method that moves nothing
MapMethod = Annotated[str, OneOf(names.MAP_METHODS)]
Space = Annotated[str, OneOf(names.SPACES)]


class TeacherSection(PretrainedSection):
    """The model whose module is moved.

    peft: `type` lora (the default), ia3, bottleneck or compacter, and the fields of that
        configuration; trained on the task with `training`. Or adapter: folder of a module that
        somebody trained.
    training: fields of `transformers.TrainingArguments`.
    seed: of the module, its head and its batches; one teacher serves every seed of the student.
    train_fraction: of the training examples, whatever the student is given.
    """

    peft: dict[str, Any] | None = None
    adapter: str | None = None
    training: Training = {}
    seed: Seed = 0
    train_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0

    @model_validator(mode="after")
    def _one_way(self):
        if (self.peft is None) == (self.adapter is None):
            raise ValueError("expected exactly one of peft and adapter")
        return self


class TransferStudentSection(PretrainedSection):
    """The model that receives the module, and how it trains from there.

    training: fields of `transformers.TrainingArguments`, and `eval_steps`.
    total_steps: after so many steps, those of refinement and of training together, the student is
        scored on the test split; the last is where its training ends. Students with and without
        refinement so have equal budgets. Null: training ends as `training` says.
    projections: folder with the projections that were trained with this student; null means the
        student's own.
    fused_lora: whether its LoRA layers run on the fused op; null means wherever there are some.
    """

    training: Training = {}
    total_steps: Annotated[list[PositiveInt], Field(min_length=1)] | None = None
    projections: str | None = None
    fused_lora: bool | None = None

    @model_validator(mode="after")
    def _one_end(self):
        if self.total_steps is None:
            return self
        if sorted(set(self.total_steps)) != self.total_steps:
            raise ValueError(f"total_steps: expected ascending steps, got {self.total_steps}")
        if "max_steps" in self.training:
            raise ValueError("training.max_steps: expected none together with total_steps")
        return self


class StatisticsSection(Section):
    """What the maps are fitted on: the texts that `transfer.texts` names, without labels.

    examples: how many of them, the first ones.
    pairing: `words` pools the sub-tokens of each word on both sides; `spans` pools the shortest
        runs of characters that both tokenizers cut out; `positions` compares pieces at equal
        positions, as the paper's code does.
    module_active: whether the teacher's features are those with its module.
    held_out_every: each so many batches one is kept for the fit scores; 0 for none.
    """

    examples: PositiveInt = 1000
    batch_size: PositiveInt = 16
    pairing: Annotated[str, OneOf(names.PAIRINGS)] = "words"
    pooling: Annotated[str, OneOf(names.POOLINGS)] = "mean"
    module_active: bool = False
    held_out_every: Annotated[int, Field(ge=0)] = 5

    @model_validator(mode="after")
    def _not_every(self):
        if self.held_out_every == 1:
            raise ValueError("held_out_every: expected 0 or at least 2, because 1 leaves no batch")
        return self


class RefineSection(DivergenceSection):
    """Label-free distillation after a map: the student with the moved module learns the logits, and
    the hidden states, of the teacher with its module, on the texts that `transfer.texts` names.

    training: fields of `transformers.TrainingArguments`.
    temperature: divides the logits of both sides inside the divergence.
    scale_by_temperature_squared: whether the divergence is multiplied by temperature^2.
    hidden_weight: of the hidden-state loss, through regressions of the block outputs, whatever the
        method; 0 leaves it out.
    """

    training: Training = {}
    hidden_weight: NotNegative = 0.0


# What the paper's code does; `reference_options` has the rest.
_REFERENCE = {
    "method": "lsa",
    "layers": "skip",
    "scope": "layer",
    "scale": "none",
    "head": "fresh",
    "measured_at": None,
}
_REFERENCE_STATISTICS = {"pairing": "positions", "held_out_every": 0, "module_active": False}


class TransferSection(Section):
    """How the module is moved.

    layers: which teacher layers a student layer takes from. sources: of `explicit`.
    method: how features of the two models are mapped onto each other; `fresh` moves no module, so
        that a moved head or refinement alone, which is plain distillation, can be compared.
    preset: `reference` makes all choices as the paper's code does.
    scope: one map per layer, or one of the residual stream for all of them.
    head_aware: query, key, value and context are mapped head by head; null: except by regressions.
    scale: how standard deviations are carried; null: as suits the method.
    write: of ridge and reduced_rank, how the changes a module writes are mapped.
    measured_at: {space: the space whose map it uses}; null: as suits the method, the gate and up
        projections at ffn_inner; {} for none.
    head: a fresh task head for the student, or the teacher's through the map of the last layer.
    head_method: of that map; null means `method`, and ridge with `method: fresh`.
    texts: what statistics and refinement read, without labels. `train`: the examples whose labels
        the teacher was trained on. `unlabelled`: the other examples of the training split, whose
        labels neither the teacher nor the student has.
    """

    layers: Annotated[str, OneOf(names.LAYER_MAPS)] = "skip"
    sources: list[Annotated[int, Field(ge=0)]] | None = None
    method: Annotated[str, OneOf((*names.MAP_METHODS, FRESH))] = "ridge"
    preset: Literal["reference"] | None = None
    scope: Annotated[str, OneOf(names.SCOPES)] = "layer"
    head_aware: bool | None = None
    scale: Annotated[str, OneOf(names.SCALES)] | None = None
    write: Annotated[str, OneOf(names.WRITES)] = "rotation"
    measured_at: dict[Space, Space] | None = None
    head: Annotated[str, OneOf(names.HEADS)] = "fresh"
    head_method: MapMethod | None = None
    texts: Annotated[str, OneOf(names.TEXTS)] = "train"
    statistics: StatisticsSection = StatisticsSection()
    refine: RefineSection | None = None

    @model_validator(mode="before")
    @classmethod
    def _of_preset(cls, raw: Any) -> Any:
        if not isinstance(raw, dict) or raw.get("preset") != "reference":
            return raw
        statistics = raw.get("statistics") or {}
        for given, choices in ((raw, _REFERENCE), (statistics, _REFERENCE_STATISTICS)):
            for name, choice in choices.items():
                if given.get(name, choice) != choice:
                    raise ValueError(
                        f"{name}: expected {choice} or nothing with preset: reference, "
                        f"got {given[name]}"
                    )
        statistics = {**statistics, **_REFERENCE_STATISTICS}
        return {**raw, **_REFERENCE, "statistics": statistics}

    @model_validator(mode="after")
    def _consistent(self):
        if (self.layers == "explicit") != (self.sources is not None):
            raise ValueError("sources: expected together with layers: explicit, and only there")
        if self.method == FRESH and self.refine is None and self.head == "fresh":
            raise ValueError(
                "method: fresh moves no module; expected it with head: transport or refine, "
                "or transfer: null for a student from scratch"
            )
        if self.head_method is not None and self.head != "transport":
            raise ValueError("head_method: expected together with head: transport, and only there")
        return self

    @property
    def map_of_head(self) -> str | None:
        """The method that maps the head, None where it is fresh."""
        if self.head != "transport":
            return None
        return self.head_method or ("ridge" if self.method == FRESH else self.method)


class TransferConfig(Section):
    """A whole `modxfer transfer` job.

    transfer: null trains the student's module from scratch alone.
    scratch: whether that baseline is trained beside the transferred module.
    seed: of the student's head, of its fresh module and of its batches.
    """

    output_dir: str
    overwrite: bool = False
    seed: Seed = 0
    task: TaskSection
    teacher: TeacherSection
    student: TransferStudentSection
    transfer: TransferSection | None = TransferSection()
    scratch: bool = True

    @model_validator(mode="after")
    def _consistent(self):
        transfer = self.transfer
        if transfer is None:
            return self
        if transfer.texts == "unlabelled" and self.teacher.train_fraction == 1:
            raise ValueError(
                "transfer.texts: unlabelled expects teacher.train_fraction below 1, because a "
                "teacher with all the labels leaves no such example"
            )
        if self.student.total_steps is not None and transfer.refine is not None:
            steps = transfer.refine.training.get("max_steps")
            if steps is None or steps >= self.student.total_steps[0]:
                raise ValueError(
                    "transfer.refine.training.max_steps: expected fewer than the first of "
                    f"student.total_steps, {self.student.total_steps[0]}, got {steps}"
                )
        return self

    def steps_before(self, *, scratch: bool) -> int:
        """Steps of refinement that count towards `student.total_steps`."""
        refine = None if self.transfer is None else self.transfer.refine
        if scratch or refine is None or self.student.total_steps is None:
            return 0
        return refine.training["max_steps"]

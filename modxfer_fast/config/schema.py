"""The sections of a job file: every class is frozen, every key is checked, defaults stand here.

Sections that belong to a library stay open dictionaries here (`training`, `pretrain`, `peft` and a
model's `config`): their keys are checked against that library's own classes by `fields.py`.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

PositiveInt = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(gt=0, lt=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class TokenizerSection(Section):
    """One of: train a byte-level BPE of `vocab_size` on the training documents, or load `path`."""

    vocab_size: Annotated[int, Field(ge=300)] | None = None
    path: str | None = None

    @model_validator(mode="after")
    def _one_way(self):
        if (self.vocab_size is None) == (self.path is None):
            raise ValueError("expected exactly one of vocab_size and path")
        return self


class DataSection(Section):
    """What to learn from.

    source: `python-docs`, a file (.txt .md .json .jsonl .csv .parquet), a folder of such files or
        of a dataset saved by `datasets`, or the id of a dataset on the hub.
    lines: a .txt or .md file holds one text a line; else the file is one text.
    format: `auto` looks at the columns: `messages` (or ShareGPT's `conversations`), `prompt` +
        `completion`, texts or lists of messages, or `text`. A column `tools` goes to the template.
    columns: {our name: name in the source} where they differ.
    packing: several documents in one row of `max_length`; an encoder gets one text a row.
    eval_source: held-out data; without it `eval_fraction` of the documents is kept out of training.
    """

    source: str
    name: str | None = None
    split: str = "train"
    lines: bool = False
    format: Literal["auto", "text", "prompt_completion", "messages"] = "auto"
    columns: dict[Literal["text", "prompt", "completion", "messages", "tools"], str] = {}
    max_length: Annotated[int, Field(ge=2)] = 1024
    packing: bool = True
    eval_source: str | None = None
    eval_split: str = "train"
    eval_fraction: Fraction = 0.05
    max_documents: PositiveInt | None = None
    max_eval_rows: PositiveInt | None = None
    split_seed: int = 0


class ModelSection(Section):
    """A model: a folder or hub id (`path`), or built from scratch (`config`).

    config: fields of the transformers configuration, with `model_type`; vocabulary and special
        tokens come from the tokenizer.
    pretrain: training fields for next-token training of a model built from `config`; the result is
        cached by everything it depends on.
    """

    path: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    config: dict[str, Any] | None = None
    pretrain: dict[str, Any] | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    attn_implementation: str | None = None

    @property
    def is_built(self) -> bool:
        """Whether the model is made here rather than loaded."""
        return self.config is not None

    @property
    def inherits(self) -> bool:
        """Whether fields that `config` leaves out come from another model."""
        return False

    @model_validator(mode="after")
    def _one_way(self):
        if (self.path is None) != self.is_built:
            raise ValueError("expected exactly one of path and config")
        named = self.inherits or isinstance((self.config or {}).get("model_type"), str)
        if self.config is not None and not named:
            raise ValueError("config: expected a model_type such as llama")
        if self.pretrain is not None and self.config is None:
            raise ValueError("pretrain: expected only together with config")
        return self


class FromTeacherSection(Section):
    """What a built student takes from the teacher's weights.

    layers: the teacher's block for each block of the student, counted from 0, where widths are
        equal; empty for fresh blocks.
    embeddings: `copy` what stands outside the blocks (embeddings, norms, pooler, head); with `pca`
        the embeddings, projected on the leading singular directions of the teacher's table, where
        the student is narrower; or `none`.
    """

    layers: list[Annotated[int, Field(ge=0)]] = []
    embeddings: Literal["copy", "pca", "none"] = "copy"

    @model_validator(mode="after")
    def _takes_something(self):
        if self.embeddings == "pca" and self.layers:
            raise ValueError(
                "layers: expected none with embeddings: pca, because blocks of another width "
                f"cannot be copied, got {self.layers}"
            )
        if self.embeddings == "none" and not self.layers:
            raise ValueError("layers: expected at least one where embeddings is none")
        return self


class StudentSection(ModelSection):
    """from_teacher: start from the teacher's weights; fields that `config` leaves out are then the
        teacher's, and as many blocks as are copied.
    peft: fields of `peft.LoraConfig`; everything outside the adapters is then frozen.

    fused_lora: whether LoRA layers run on the fused op; null means wherever there is `peft`.
    """

    from_teacher: FromTeacherSection | None = None
    peft: dict[str, Any] | None = None
    fused_lora: bool | None = None

    @model_validator(mode="after")
    def _has_adapters(self):
        if self.fused_lora and self.peft is None:
            raise ValueError("fused_lora: expected a peft section, whose layers it fuses")
        return self

    @property
    def is_built(self) -> bool:
        return self.config is not None or self.from_teacher is not None

    @property
    def inherits(self) -> bool:
        return self.from_teacher is not None

    @property
    def fuses_lora(self) -> bool:
        return self.peft is not None and self.fused_lora is not False


def _layer_numbers(value: Any) -> Any:
    """Layer numbers as ints: keys of JSON, and of `--set` with a dotted path, are text."""
    if not isinstance(value, dict):
        return value
    is_number = re.compile(r"-?[0-9]+").fullmatch
    return {
        int(key) if isinstance(key, str) and is_number(key) else key: item
        for key, item in value.items()
    }


Layers = Annotated[dict[int, int], BeforeValidator(_layer_numbers), Field(min_length=1)]
LayerWeights = Annotated[float | dict[int, float], BeforeValidator(_layer_numbers)]
Backend = Literal["triton", "cpp", "reference"] | None


class HiddenStatesSection(Section):
    """Arguments of `modxfer_fast.losses.HiddenStateLoss`: layers that learn from layers.

    layers: {student layer: teacher layer}; 0 is the embeddings, i the output of block i, -1 that of
        the last block.
    weight: one number, or {student layer: number}.
    tokens: which tokens count, `all` that are no padding or those with `labels`.
    learning_rate, weight_decay: of the projections; null takes those of `training`.
    impl: eager is the plain PyTorch yardstick.
    """

    layers: Layers
    loss: Literal["mse", "normalized_mse", "cosine", "smooth_l1", "relative"] = "mse"
    beta: Annotated[float, Field(ge=0)] | None = None
    norm: Literal["none", "rms", "layer"] = "none"
    norm_eps: Annotated[float, Field(gt=0)] = 1e-6
    weight: LayerWeights = 1.0
    pair_reduction: Literal["mean", "sum"] = "mean"
    projection: Literal["none", "full", "low_rank"] = "full"
    rank: PositiveInt | None = None
    bias: bool = False
    shared: bool = False
    init: Literal["orthogonal", "identity", "xavier"] = "orthogonal"
    workspace_mb: PositiveInt = 64
    backend: Backend = None
    impl: Literal["fused", "eager"] = "fused"
    tokens: Literal["all", "labels"] = "all"
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    weight_decay: Annotated[float, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _consistent(self):
        if (self.projection == "low_rank") != (self.rank is not None):
            raise ValueError("rank: expected together with projection: low_rank, and only there")
        if self.beta is not None and self.loss != "smooth_l1":
            raise ValueError(f"beta: expected with loss: smooth_l1 alone, got it with {self.loss}")
        return self


class RelationsSection(Section):
    """Arguments of `modxfer_fast.losses.AttentionRelationLoss`; needs `data.packing: false`.

    layers: {student block: teacher block}, from 1; -1 is the last.
    num_heads: relation heads; null takes as many as fit the widths of both models.
    """

    layers: Layers
    kind: Literal["minilmv2", "minilm"] = "minilmv2"
    num_heads: PositiveInt | None = None
    weight: LayerWeights = 1.0
    relation_weights: Annotated[
        list[Annotated[float, Field(ge=0)]], Field(min_length=3, max_length=3)
    ] = [1.0, 1.0, 1.0]
    pair_reduction: Literal["mean", "sum"] = "mean"
    workspace_mb: PositiveInt = 64
    backend: Backend = None


class LossSection(Section):
    """Arguments of `modxfer_fast.linear_kd_loss`; `impl` dense is the plain PyTorch yardstick.

    hidden_states, relations: losses inside the networks, beside those of the logits.
    """

    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    beta: Annotated[float, Field(ge=0, le=1)] | None = None
    temperature: Annotated[float, Field(gt=0)] = 1.0
    kd_weight: Annotated[float, Field(ge=0)] = 1.0
    ce_weight: Annotated[float, Field(ge=0)] = 0.0
    scale_by_temperature_squared: bool = False
    workspace_mb: PositiveInt = 512
    backend: Backend = None
    impl: Literal["fused", "dense"] = "fused"
    hidden_states: HiddenStatesSection | None = None
    relations: RelationsSection | None = None

    @model_validator(mode="after")
    def _consistent(self):
        if self.beta is not None and self.divergence != "jsd":
            raise ValueError(
                f"beta: expected with divergence: jsd alone, got it with {self.divergence}"
            )
        return self

    def of_logits(self) -> dict[str, Any]:
        """The arguments of `linear_kd_loss` alone."""
        return self.model_dump(exclude={"impl", "hidden_states", "relations"})

    @property
    def has_features(self) -> bool:
        """Whether there is a loss inside the networks."""
        return self.hidden_states is not None or self.relations is not None


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


class JobConfig(Section):
    """A whole `modxfer distill` job.

    kind: `causal_lm`; or `encoder`, which learns from `loss.hidden_states` on plain text, one a
        row, without logits or labels: where not given, `kd_weight` is then 0, `packing` false and
        `max_length` 512.
    """

    kind: Literal["causal_lm", "encoder"] = "causal_lm"
    output_dir: str
    overwrite: bool = False
    seeds: Annotated[list[int], Field(min_length=1)] = [0]
    tokenizer: TokenizerSection | None = None
    data: DataSection
    teacher: ModelSection
    student: StudentSection
    loss: LossSection = LossSection()
    training: dict[str, Any] = {}
    compare: CompareSection = CompareSection()

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
        if self.kind == "encoder":
            self._check_encoder()
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds: expected different numbers, got {self.seeds}")
        if self.tokenizer is None and self.teacher.path is None:
            raise ValueError(
                "tokenizer: expected a section, because the teacher is not loaded from a path"
            )
        if self.loss.relations is not None and self.data.packing:
            raise ValueError(
                "loss.relations: expected data.packing: false, because a relation spans a row"
            )
        return self

    def _check_encoder(self) -> None:
        loss, wrong = self.loss, "with kind: encoder"
        if loss.hidden_states is None:
            raise ValueError(f"loss.hidden_states: expected a section {wrong}, which learns by it")
        for name in ("kd_weight", "ce_weight"):
            if getattr(loss, name) != 0:
                raise ValueError(
                    f"loss.{name}: expected 0 or nothing {wrong}, which has no logits, "
                    f"got {getattr(loss, name)}"
                )
        if loss.hidden_states.tokens != "all":
            raise ValueError(
                f"loss.hidden_states.tokens: expected all {wrong}, whose text has no labels, "
                f"got {loss.hidden_states.tokens}"
            )
        if self.data.packing:
            raise ValueError(f"data.packing: expected false {wrong}, which sees a whole row")
        if self.data.format not in ("auto", "text"):
            raise ValueError(f"data.format: expected text {wrong}, got {self.data.format}")
        if self.tokenizer is not None and self.tokenizer.path is None:
            raise ValueError(f"tokenizer.vocab_size: expected a path {wrong}, or no section")
        if self.teacher.path is None:
            raise ValueError(f"teacher.path: missing; expected a trained model {wrong}")
        for name, given in (
            ("student.pretrain", self.student.pretrain is not None),
            ("student.peft", self.student.peft is not None),
            ("compare.ce_only", self.compare.ce_only),
            ("compare.parts", self.compare.parts),
            ("compare.loss_rows", self.compare.loss_rows is not None),
        ):
            if given:
                raise ValueError(f"{name}: expected nothing {wrong}")

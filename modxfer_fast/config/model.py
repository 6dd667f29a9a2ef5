"""The sections about models: a tokenizer, a checkpoint, a model built here, a student."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from modxfer_fast.config.section import OneOf, Positive, PositiveInt, Section
from modxfer_fast.config.server import REACHING, WAYS, ServerSection
from modxfer_fast.kernels.names import TAILS

EMBEDDINGS = ("copy", "pca", "none")
# where a teacher's parameters, or its answers, are kept
PLANS = ("replica", "zero3", "zero3_offload", "quantized", "cached", "served", "self")
SERVED_APIS = ("vllm", "sglang")
# keys of a served teacher that say where it is and how it is reached, not what it answers
SERVED_WAYS = (*REACHING, "request_tokens")
# how the linears of a quantized teacher's blocks are stored
QUANTIZATIONS = ("int8", "nf4")
MIXTURES = ("probabilities", "losses")
# what a student that teaches itself learns from
SOURCES = ("base", "ema", "start")
CACHE_DTYPES = ("float32", "bfloat16", "float16")
SIGNALS = ("hidden", "topk")


class TokenizerSection(Section):
    """One of: train a byte-level BPE of `vocab_size` on the training documents, or load `path`."""

    vocab_size: Annotated[int, Field(ge=300)] | None = None
    path: str | None = None

    @model_validator(mode="after")
    def _one_way(self):
        if (self.vocab_size is None) == (self.path is None):
            raise ValueError("expected exactly one of vocab_size and path")
        return self


class CheckpointSection(Section):
    """path: a folder, or an id of the hub.
    dtype: null loads the dtype of the checkpoint.
    """

    path: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    attn_implementation: str | None = None


class PretrainedSection(CheckpointSection):
    """A pretrained model.

    path: a folder, or an id of the hub.
    dtype: null loads the dtype of the checkpoint.
    """

    path: str


class ModelSection(CheckpointSection):
    """A model: a folder or hub id (`path`), or built from scratch (`config`).

    config: fields of the transformers configuration, with `model_type`; vocabulary and special
        tokens come from the tokenizer.
    pretrain: training fields for next-token training of a model built from `config`; the result is
        cached by everything it depends on.
    """

    config: dict[str, Any] | None = None
    pretrain: dict[str, Any] | None = None

    @property
    def is_built(self) -> bool:
        """Whether the model is made here rather than loaded."""
        return self.config is not None

    @property
    def is_student(self) -> bool:
        """Whether this is no model of its own."""
        return False

    @property
    def inherits(self) -> bool:
        """Whether fields that `config` leaves out come from another model."""
        return False

    @model_validator(mode="after")
    def _one_way(self):
        if self.is_student:
            for name, field in ModelSection.model_fields.items():
                if getattr(self, name) != field.default:
                    raise ValueError(
                        f"{name}: expected nothing with plan: self, which is the student's own "
                        "network"
                    )
            return self
        if (self.path is None) != self.is_built:
            raise ValueError("expected exactly one of path and config")
        named = self.inherits or isinstance((self.config or {}).get("model_type"), str)
        if self.config is not None and not named:
            raise ValueError("config: expected a model_type such as llama")
        if self.pretrain is not None and self.config is None:
            raise ValueError("pretrain: expected only together with config")
        return self


class CacheSection(Section):
    """The answers that `modxfer cache` keeps, and a teacher with `plan: cached` gives.

    folder: null is `<output_dir>.cache`.
    hidden: whether the last hidden states of each token are kept, with the teacher's head.
    dtype: of hidden states; null is that of the teacher, which loses nothing.
    top_k: how many classes are kept of each token, with their log-probabilities; 0 for none.
    signal: of a cache with both, what the student learns from.
    tail: what becomes of the classes that are not kept; as of `modxfer_fast.TeacherTopK`.
    """

    folder: str | None = None
    hidden: bool = True
    dtype: Annotated[str, OneOf(CACHE_DTYPES)] | None = None
    top_k: Annotated[int, Field(ge=0)] = 0
    signal: Annotated[str, OneOf(SIGNALS)] | None = None
    tail: Annotated[str, OneOf(TAILS)] = "bucket"

    @model_validator(mode="after")
    def _keeps_something(self):
        if not self.hidden and not self.top_k:
            raise ValueError("expected hidden: true, a top_k of at least 1, or both")
        if self.signal == "hidden" and not self.hidden:
            raise ValueError("signal: expected topk, because hidden is false, got hidden")
        if self.signal == "topk" and not self.top_k:
            raise ValueError("signal: expected hidden, because top_k is 0, got topk")
        return self


class ServedSection(ServerSection):
    __doc__ = f"""A teacher behind an endpoint, asked over HTTP for the likeliest classes of each
    token. The `path` of the teacher then names its configuration and tokenizer; no weights of it
    are read.

    url: of the server, such as http://HOST:8000.
    model: the name that it is served under.
    {WAYS}
    api: `vllm` asks /v1/completions for prompt_logprobs, `sglang` /generate for
        top_logprobs_num.
    top_k: classes that are told of each token, with their log-probabilities.
    tail: what becomes of the classes that are not told; as of `modxfer_fast.TeacherTopK`.
    request_tokens: most tokens of a request; a longer document is one by itself.
    """

    api: Annotated[str, OneOf(SERVED_APIS)] = "vllm"
    top_k: PositiveInt = 20
    tail: Annotated[str, OneOf(TAILS)] = "bucket"
    request_tokens: PositiveInt = 8192


class TeacherModelSection(ModelSection):
    """plan: `replica` keeps the whole teacher in every process; `zero3` divides it over them, and
        `zero3_offload` keeps the parts in the memory of the host, whatever the student's
        zero_stage; `quantized` keeps the linears of its blocks in fewer bits; `cached` loads none
        of it, and answers from the folder that `modxfer cache` filled; `served` asks a server;
        `self` is the network of the student, whose `peft` is trained, and takes no path.
    quantization: with `plan: quantized`, `int8` (torchao; where not given) or `nf4` (4 bits of
        bitsandbytes); with `plan: cached`, that of the teacher whose answers are kept.
    source: with `plan: self`, what of the student teaches: `base` without its adapters, `start`
        with those it began with, `ema` with a moving average of them.
    ema_decay: share of that average that an optimiser step keeps.
    cache: what is kept, and where; used with `plan: cached` and by `modxfer cache`.
    served: where the server is, and what is asked; `modxfer cache` then asks it too, and keeps its
        `top_k` classes.
    """

    plan: Annotated[str, OneOf(PLANS)] = "replica"
    quantization: Annotated[str, OneOf(QUANTIZATIONS)] | None = None
    source: Annotated[str, OneOf(SOURCES)] = "base"
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.999
    cache: CacheSection = CacheSection()
    served: ServedSection | None = None

    @model_validator(mode="after")
    def _is_served(self):
        if self.served is None:
            if self.plan == "served":
                raise ValueError("served: missing; expected a section with plan: served")
            return self
        if self.plan not in ("served", "cached"):
            raise ValueError(
                f"plan: expected served, or cached, beside a section served, got {self.plan}"
            )
        if self.path is None:
            raise ValueError(
                "path: missing; expected the configuration and tokenizer of the served model"
            )
        for name in ("hidden", "dtype", "top_k"):
            if getattr(self.cache, name) != CacheSection.model_fields[name].default:
                raise ValueError(
                    f"cache.{name}: expected nothing beside a section served, of which top_k "
                    "classes are kept"
                )
        return self

    @model_validator(mode="after")
    def _teaches_itself(self):
        of_average = self.plan == "self" and self.source == "ema"
        for name, is_read, where in (
            ("source", self.plan == "self", "plan: self"),
            ("ema_decay", of_average, "plan: self and source: ema"),
        ):
            value = getattr(self, name)
            if not is_read and value != TeacherModelSection.model_fields[name].default:
                raise ValueError(f"{name}: expected {where} beside it, got {value} without")
        return self

    @property
    def is_student(self) -> bool:
        """Whether the student's own network teaches."""
        return self.plan == "self"

    @property
    def stored_as(self) -> str | None:
        """The quantization of the teacher that answers, or has answered; None for its own dtype."""
        if self.plan == "quantized":
            return self.quantization or QUANTIZATIONS[0]
        return self.quantization

    @model_validator(mode="after")
    def _is_quantized(self):
        if self.quantization is None:
            return self
        if self.plan not in ("quantized", "cached") or self.served is not None:
            where = "a section served" if self.served is not None else f"plan: {self.plan}"
            raise ValueError(
                f"quantization: expected nothing with {where}, got {self.quantization}"
            )
        return self

    @property
    def listed_classes(self) -> int | None:
        """How many classes of a token are all that is known of the teacher, None where more is."""
        if self.plan not in ("served", "cached"):
            return None
        if self.served is not None:
            return self.served.top_k
        hidden = self.cache.hidden and self.cache.signal != "topk"
        return None if hidden else self.cache.top_k

    @property
    def is_divided(self) -> bool:
        """Whether no process has the whole teacher."""
        return self.plan.startswith("zero3")


class OneOfTeachersSection(TeacherModelSection):
    """One of several teachers, with the keys of `teacher`; where it is asked for a cache without a
    folder, that is `<output_dir>.cache/<name>`.

    weight: its part in the mixture of all, 1 where not given; none where the data names the
        teacher of each document.
    """

    weight: Positive | None = None


class FromTeacherSection(Section):
    """What a built student takes from the teacher's weights.

    layers: the teacher's block for each block of the student, counted from 0, where widths are
        equal; empty for fresh blocks.
    embeddings: `copy` what stands outside the blocks (embeddings, norms, pooler, head); with `pca`
        the embeddings, projected on the leading singular directions of the teacher's table, where
        the student is narrower; or `none`.
    """

    layers: list[Annotated[int, Field(ge=0)]] = []
    embeddings: Annotated[str, OneOf(EMBEDDINGS)] = "copy"

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


class PeftSection(Section):
    """peft: `type` lora (the default), ia3, bottleneck or compacter, and the fields of that
        configuration; null trains the whole model.
    fused_lora: whether LoRA layers run on the fused op; null means wherever there are some.
    """

    peft: dict[str, Any] | None = None
    fused_lora: bool | None = None

    @model_validator(mode="after")
    def _has_lora(self):
        if self.fused_lora and not self.fuses_lora:
            raise ValueError(
                "fused_lora: expected a peft section of type lora, whose layers it fuses"
            )
        return self

    @property
    def fuses_lora(self) -> bool:
        """Whether LoRA layers of `peft` run on the fused op."""
        is_lora = self.peft is not None and self.peft.get("type", "lora") == "lora"
        return is_lora and self.fused_lora is not False


class StudentSection(PeftSection, ModelSection):
    """from_teacher: start from the teacher's weights; fields that `config` leaves out are then the
        teacher's, and as many blocks as are copied.
    peft: `type` lora (the default), ia3, bottleneck or compacter, and the fields of that
        configuration; everything outside the module is then frozen.
    fused_lora: whether LoRA layers run on the fused op; null means wherever there are some.
    """

    from_teacher: FromTeacherSection | None = None

    @property
    def is_built(self) -> bool:
        return self.config is not None or self.from_teacher is not None

    @property
    def inherits(self) -> bool:
        return self.from_teacher is not None

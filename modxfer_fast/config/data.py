"""The data section: what a language model or an encoder learns from."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from modxfer_fast.config.section import NotNegative, PositiveInt, Section, Seed


class SourceKeys(Section):
    """How the documents of one source are read."""

    name: str | None = None
    split: str = "train"
    lines: bool = False
    format: Literal["auto", "text", "prompt_completion", "messages"] = "auto"
    columns: dict[Literal["text", "prompt", "completion", "messages", "tools"], str] = {}
    teacher_column: str | None = None
    teacher_prompt: str | None = None
    max_documents: PositiveInt | None = None
    eval_source: str | None = None
    eval_split: str = "train"


class SourceSection(SourceKeys):
    """One of several sources: the keys of `data` that say how documents are read, and what they
    weigh. Each must differ from the others in `source`, `name` or `split`.

    weight: share of the training documents, relative to those of the other sources; all have one
        or none has. 0: held-out documents of it are measured, none is learnt from.
    teacher: name among `teachers` of the one that all its documents are learnt from.
    loss_weight: factor of the loss of each of its tokens, in training; what divides the sum over a
        step is the number of tokens that are learnt, whatever they weigh.
    """

    source: str
    weight: NotNegative | None = None
    loss_weight: NotNegative = 1.0
    teacher: str | None = None

    @property
    def names_teachers(self) -> bool:
        """Whether each of its documents has a teacher of its own."""
        return self.teacher is not None or self.teacher_column is not None

    @property
    def label(self) -> str:
        """What it is called in messages and figures."""
        split = "" if self.split == "train" else self.split
        return ", ".join(part for part in (self.source, self.name, split) if part)


class DataSection(SourceKeys):
    """What to learn from: one `source`, or several `sources`.

    source: `python-docs`, a file (.txt .md .json .jsonl .csv .parquet, but the last one also
        compressed, as .jsonl.gz, .bz2, .xz or .zst), a pattern of such files (`chats/*.jsonl`, `**`
        for folders of any depth; in the order of their names), a folder of them or of a dataset
        saved by `datasets`, or the id of a dataset on the hub.
    sources: several, mixed by their `weight` into exact shares of the documents, as
        `datasets.interleave_datasets` has them by chance; without weights each document comes once.
    stopping_strategy: with weights, how many documents there are: `first_exhausted`, as many as
        without repeating one; `all_exhausted`, until each was there, those of smaller sources
        several times. `first_exhausted` where not given.
    lines: a .txt or .md file holds one text a line; else the file is one text.
    format: `auto` looks at the columns: `messages` (or ShareGPT's `conversations`), `prompt` +
        `completion`, texts or lists of messages, or `text`. A column `tools` goes to the template.
    columns: {our name: name in the source} where they differ.
    teacher_column: the column that names the teacher of each document, among `teachers`.
    teacher_prompt: the column with what the teacher reads in place of `prompt`, text or messages as
        that is; the completion is the same, and compared token by token.
    packing: several documents in one row of `max_length`; an encoder gets one text a row.
    streaming: read, tokenise and pack while training, without end, files that no memory holds. Each
        rank and worker of a loader reads all and keeps its share; sources have weights and begin
        anew when they end. Needs `max_steps`. A resumed run goes on at the document it had come to.
    shuffle_buffer: documents that are shuffled and packed together while streaming; 1000 where not
        given.
    eval_documents: held out at the head of each source while streaming, where it has no
        `eval_source`; 100 where not given.
    max_documents: chosen by `split_seed`, of all in the source.
    eval_source: held-out data; without it `eval_fraction` of the documents is kept out of training.
    max_eval_rows: of each source.
    """

    source: str | None = None
    sources: Annotated[list[SourceSection], Field(min_length=1)] | None = None
    stopping_strategy: Literal["first_exhausted", "all_exhausted"] | None = None
    max_length: Annotated[int, Field(ge=2)] = 1024
    packing: bool = True
    eval_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05
    max_eval_rows: PositiveInt | None = None
    split_seed: Seed = 0
    streaming: bool = False
    shuffle_buffer: PositiveInt | None = None
    eval_documents: PositiveInt | None = None

    @property
    def buffer(self) -> int:
        """Documents of a block of a stream."""
        return self.shuffle_buffer or 1000

    @property
    def num_eval_documents(self) -> int:
        """Held out at the head of a stream."""
        return self.eval_documents or 100

    @property
    def parts(self) -> tuple[SourceSection, ...]:
        """The sources, also where there is one."""
        if self.sources is not None:
            return tuple(self.sources)
        own = {key: getattr(self, key) for key in SourceKeys.model_fields}
        return (SourceSection(source=self.source or "", **own),)

    @model_validator(mode="after")
    def _consistent(self):
        if (self.source is None) == (self.sources is None):
            got = "neither" if self.source is None else "both"
            raise ValueError(f"expected exactly one of source and sources, got {got}")
        if self.sources is not None:
            self._check_sources(self.sources)
        elif self.stopping_strategy is not None:
            raise ValueError("stopping_strategy: expected sources with weights, got one source")
        self._check_streaming()
        return self

    def _check_streaming(self) -> None:
        if not self.streaming:
            for key in ("shuffle_buffer", "eval_documents"):
                if getattr(self, key) is not None:
                    raise ValueError(f"{key}: expected streaming: true beside it, got false")
            return
        if self.stopping_strategy is not None:
            raise ValueError("stopping_strategy: expected none with streaming, which has no end")
        if self.eval_fraction != DataSection.model_fields["eval_fraction"].default:
            raise ValueError("eval_fraction: expected eval_documents with streaming")
        for source in self.parts:
            if source.max_documents is not None:
                raise ValueError("max_documents: expected none with streaming; set max_steps")
            if len(self.parts) > 1 and source.weight is None:
                raise ValueError(
                    f"sources: expected a weight for each with streaming, {source.label} has none"
                )

    def _check_sources(self, sources: list[SourceSection]) -> None:
        for key, field in SourceKeys.model_fields.items():
            if getattr(self, key) != field.default:
                raise ValueError(f"{key}: expected in each of sources, got it beside them")
        for source in sources:
            if source.teacher is not None and source.teacher_column is not None:
                raise ValueError(
                    f"sources: expected a teacher or a teacher_column, {source.label} has both"
                )
        without = [source.label for source in sources if source.teacher_prompt is None]
        if 0 < len(without) < len(sources):
            raise ValueError(
                f"sources: expected a teacher_prompt for each or for none, {without[0]} has none"
            )
        labels = [source.label for source in sources]
        twice = next((label for label in labels if labels.count(label) > 1), None)
        if twice is not None:
            raise ValueError(f"sources: expected different ones, got {twice} twice; set its weight")
        weights = [source.weight for source in sources]
        given = [weight for weight in weights if weight is not None]
        if given and len(given) < len(weights):
            missing = labels[weights.index(None)]
            raise ValueError(f"sources: expected a weight for each or for none, {missing} has none")
        if given and not any(given):
            raise ValueError("sources: expected a positive weight, got 0 for each")
        if not given and self.stopping_strategy is not None:
            raise ValueError("stopping_strategy: expected sources with weights, got none")

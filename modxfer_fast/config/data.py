"""The data section: what a language model or an encoder learns from."""

from typing import Annotated, Literal

from pydantic import Field

from modxfer_fast.config.section import PositiveInt, Section


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
    eval_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05
    max_documents: PositiveInt | None = None
    max_eval_rows: PositiveInt | None = None
    split_seed: int = 0

"""Sources -> documents -> pieces -> packed rows -> batches, and the tokenizer in between."""

from modxfer_fast.data.build import (
    Corpus,
    Documents,
    Rows,
    build_rows,
    load_corpus,
    rows_from_documents,
)
from modxfer_fast.data.collator import IGNORE_INDEX, CausalCollator, EncoderCollator
from modxfer_fast.data.python_docs import python_docs
from modxfer_fast.data.row_stream import RowStream
from modxfer_fast.data.sources import load_source
from modxfer_fast.data.tokenizer import (
    has_tokenizer,
    load_tokenizer,
    tokenizer_digest,
    train_tokenizer,
)
from modxfer_fast.errors import DataError

__all__ = [
    "IGNORE_INDEX",
    "CausalCollator",
    "Corpus",
    "DataError",
    "Documents",
    "EncoderCollator",
    "RowStream",
    "Rows",
    "build_rows",
    "has_tokenizer",
    "load_corpus",
    "load_source",
    "load_tokenizer",
    "python_docs",
    "rows_from_documents",
    "tokenizer_digest",
    "train_tokenizer",
]

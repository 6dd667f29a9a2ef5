"""Rows of top-K classes as arcee's DistillKit compresses them.

input_ids [n]   compressed_logprobs [m, bytes]   bytepacked_indices [m, bytes]   m = n or n - 1

in Parquet files of a folder, with compression_config.yaml beside them: of d classes k are listed,
most likely first, as a vector x of k numbers: their log-probabilities or, with delta_encoding,
the first of these and the differences of the others. A row of bytes is, little-endian:

    x[:exact_k]         in exact_dtype
    coefficients        in term_dtype, one for each of polynomial_terms f_i: x[exact_k + j] is about
                        sum_i c_i f_i(j), with j / (k - exact_k - 1) for j where normalize_t
    residual bins       of num_elements in turn: a scale in scale_dtype, then integers q of
                        element_bits, most significant bit first: what is left is
                        scale (q - 2^(element_bits - 1)), or with one bit scale (2 q - 1)

and indices are integers of ceil(log2 d) bits. The list of position t is that of token t + 1.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor

from modxfer_fast.teacher_cache.importers.entries import (
    Entry,
    ImportRefused,
    TeacherHead,
    TopK,
    following_by,
    top_k_answers,
)
from modxfer_fast.teacher_cache.importers.records import records_of, tensor_of
from modxfer_fast.teacher_cache.store import Payload

_CONFIG = "compression_config.yaml"
_IDS, _LOG_PROBS, _INDICES = "input_ids", "compressed_logprobs", "bytepacked_indices"
_Dtype = Literal["float16", "bfloat16", "float32", "float64"]


class ResidualBin(BaseModel):
    model_config = ConfigDict(extra="forbid")
    scale_dtype: _Dtype
    element_bits: int = Field(gt=0, le=32)
    num_elements: int = Field(gt=0)


class Compression(BaseModel):
    """The fields of a compression_config.yaml."""

    model_config = ConfigDict(extra="forbid")
    d: int = Field(gt=0)
    k: int = Field(gt=0)
    exact_k: int = Field(ge=0)
    exact_dtype: _Dtype = "float32"
    polynomial_terms: list[int | Literal["sqrt", "exp"]] | None = None
    term_dtype: _Dtype = "float32"
    residual_bins: list[ResidualBin]
    delta_encoding: bool = True
    error_diffusion: bool = False  # concerns who writes
    normalize_t: bool = False

    @model_validator(mode="after")
    def _fits(self) -> "Compression":
        rest = self.k - self.exact_k
        binned = sum(own.num_elements for own in self.residual_bins)
        if rest < 0 or binned > rest:
            raise ValueError(f"k: expected at least exact_k and the bins, got {self.k}")
        return self

    @property
    def index_bits(self) -> int:
        return (self.d - 1).bit_length()

    def lengths(self) -> tuple[int, int]:
        """Bytes of the log-probabilities and of the indices of a token."""
        size = self.exact_k * _dtype(self.exact_dtype).itemsize
        size += len(self.polynomial_terms or ()) * _dtype(self.term_dtype).itemsize
        for own in self.residual_bins:
            size += _dtype(own.scale_dtype).itemsize + -(-own.num_elements * own.element_bits // 8)
        return size, -(-self.k * self.index_bits // 8)

    def log_probs(self, data: Tensor) -> Tensor:
        """[m, k] fp32 of bytes [m, lengths()[0]] uint8."""
        start = 0

        def numbers(count: int, dtype: str) -> Tensor:
            nonlocal start
            size = count * _dtype(dtype).itemsize
            own = data[:, start : start + size].contiguous()
            start += size
            return own.view(_dtype(dtype)).double()

        exact = numbers(self.exact_k, self.exact_dtype) if self.exact_k else data[:, :0].double()
        approximate = torch.zeros(len(data), self.k - self.exact_k, dtype=torch.float64)
        if self.polynomial_terms:
            coefficients = numbers(len(self.polynomial_terms), self.term_dtype)
            approximate += self._polynomial(coefficients.to(_dtype(self.term_dtype)))
        first = 0
        for own in self.residual_bins:
            scale = numbers(1, own.scale_dtype)
            size = -(-own.num_elements * own.element_bits // 8)
            packed = _integers(data[:, start : start + size], own.element_bits, own.num_elements)
            start += size
            if own.element_bits == 1:
                values = 2 * packed - 1
            else:
                values = packed - 2 ** (own.element_bits - 1)
            approximate[:, first : first + own.num_elements] += scale * values
            first += own.num_elements
        found = torch.cat([exact, approximate], -1)
        return (found.cumsum(-1) if self.delta_encoding else found).float()

    def _polynomial(self, coefficients: Tensor) -> Tensor:
        """[m, k - exact_k] of coefficients [m, terms], whose dtype the residuals were taken in."""
        count = self.k - self.exact_k
        points = torch.arange(count, dtype=torch.float64)
        if self.normalize_t:
            points = torch.linspace(0, 1, count, dtype=torch.float64)
        terms = torch.stack(
            [
                points**term if isinstance(term, int) else getattr(torch, term)(points)
                for term in self.polynomial_terms or ()
            ],
            -1,
        )
        return (terms.to(coefficients.dtype) * coefficients[:, None]).sum(-1)

    def indices(self, data: Tensor) -> Tensor:
        """[m, k] int64 of bytes [m, lengths()[1]] uint8."""
        return _integers(data, self.index_bits, self.k)


class DistillKitRows(TopK):
    """A folder that DistillKit captured into, or a Parquet file of it."""

    name = "distillkit"

    def __init__(self, path: str | Path, head: TeacherHead) -> None:
        super().__init__(path, head)
        self.readings = ("next", "own")
        self.compression = read_compression(self.path)
        self._exceeded = False

    def entries(self) -> Iterator[Entry]:
        names = (_LOG_PROBS, _INDICES)
        for place, record in records_of(self.path, (_IDS, *names)):
            ids = tensor_of(place, _IDS, record[_IDS], torch.int32).flatten()
            kept = {}
            for name, width in zip(names, self.compression.lengths(), strict=True):
                kept[name] = _bytes(place, name, record[name], width)
            counts = [len(own) for own in kept.values()]
            if len(set(counts)) != 1 or counts[0] not in (len(ids), len(ids) - 1):
                raise ImportRefused(
                    f"{place}: expected {len(ids) - 1} lists for {len(ids)} tokens, got {counts}"
                )
            yield Entry(place, ids, kept)

    def payload(self, entry: Entry) -> Payload:
        return Payload(top_k=self.compression.k)

    def answers(self, entry: Entry, reading: str) -> dict[str, Tensor]:
        log_probs = self.compression.log_probs(entry.kept[_LOG_PROBS])
        ids = self.compression.indices(entry.kept[_INDICES])
        absent = len(entry.ids) - len(ids)
        if absent:
            ids = torch.cat([ids, ids.new_full((absent, ids.shape[1]), -1)])
            log_probs = torch.cat([log_probs, log_probs.new_zeros(absent, ids.shape[1])])
        if reading == "own":
            ids, log_probs = following_by(1, ids, log_probs, absent=(-1, 0.0))
        ids = ids.masked_fill(log_probs == -torch.inf, -1)
        log_probs = self._within_one(ids, log_probs)
        return top_k_answers(entry.place, ids, log_probs, self.head.weight.shape[0])

    def _within_one(self, ids: Tensor, log_probs: Tensor) -> Tensor:
        """Lists whose sum an approximation took above 1 are divided by it."""
        mass = log_probs.masked_fill(ids < 0, -torch.inf).double().logsumexp(-1, keepdim=True)
        if not self._exceeded and (mass > 0).any():
            self._exceeded = True
            self.notes.append(
                f"{self.path}: some lists sum to more than 1, as approximations do; they are "
                "divided by their sum"
            )
        return (log_probs - mass.clamp(min=0)).float().masked_fill(ids < 0, 0.0)


def read_compression(path: Path) -> Compression:
    """The configuration in a folder, or beside a file; ImportRefused where there is none."""
    file = (path if path.is_dir() else path.parent) / _CONFIG
    try:
        fields: Any = yaml.safe_load(file.read_text(encoding="utf-8"))
        return Compression.model_validate(fields)
    except (OSError, yaml.YAMLError) as error:
        raise ImportRefused(f"{file}: cannot be read ({error})") from error
    except ValidationError as error:
        first: Mapping[str, Any] = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ImportRefused(f"{file}: {where}: {first['msg']}, got {first['input']!r}") from error


def _dtype(name: str) -> torch.dtype:
    return getattr(torch, name)


def _bytes(place: str, name: str, rows: list, width: int) -> Tensor:
    data = tensor_of(place, name, rows, torch.uint8).reshape(len(rows), -1)
    if len(rows) and data.shape[1] != width:
        raise ImportRefused(
            f"{place}: {name}: expected {width} bytes a token by {_CONFIG}, got {data.shape[1]}"
        )
    return data.reshape(len(rows), width)


def _integers(data: Tensor, bits: int, count: int) -> Tensor:
    """[m, count] int64 of `bits` each, most significant first, of bytes [m, B] uint8."""
    places = torch.arange(7, -1, -1)
    stream = (data.long()[..., None] >> places & 1).flatten(1)[:, : count * bits]
    weights = 2 ** torch.arange(bits - 1, -1, -1)
    return (stream.reshape(len(data), count, bits) * weights).sum(-1)

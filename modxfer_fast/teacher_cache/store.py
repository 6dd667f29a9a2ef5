"""The folder of a cache: shards that are written whole, an index over their keys, checked reads."""

import dataclasses
import hashlib
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from modxfer_fast.errors import UserError
from modxfer_fast.files import damaged_files, new_folder, seal, sealed_facts
from modxfer_fast.teacher_cache.documents import KEY_BYTES, Document

FORMAT = 1
ANSWERS, HEAD = "answers.safetensors", "head.safetensors"
_AGAIN = "remove the shard's folder and capture it again"
# of hidden states
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class CacheError(UserError):
    """A cache of another teacher, a damaged one, or one that lacks a document."""


@dataclasses.dataclass(frozen=True)
class Payload:
    """What is kept of each token.

    Attributes:
        hidden: dtype of the last hidden state behind the final norm, "float32", "bfloat16" or
            "float16"; None to keep none. In the dtype that the teacher runs in it is lossless, and
            the teacher's head is kept beside it.
        width: of hidden states, 0 where there are none.
        top_k: classes kept with their log-probabilities and that of all others, in fp32; 0 for
            none.
    """

    hidden: str | None = None
    width: int = 0
    top_k: int = 0

    def __post_init__(self) -> None:
        if self.hidden is None and not self.top_k:
            raise ValueError("payload: expected hidden, top_k or both, got neither")
        if self.hidden is not None and self.hidden not in DTYPES:
            raise ValueError(
                f"hidden: expected one of {', '.join(DTYPES)} or None, got {self.hidden!r}"
            )

    def tensors(self) -> dict[str, tuple[int, torch.dtype]]:
        """Of each tensor of a token its width and dtype."""
        kept: dict[str, tuple[int, torch.dtype]] = {}
        if self.hidden is not None:
            kept["hidden"] = self.width, DTYPES[self.hidden]
        if self.top_k:
            kept["topk_ids"] = self.top_k, torch.int32
            kept["topk_log_probs"] = self.top_k, torch.float32
            kept["topk_log_tail"] = 1, torch.float32
        return kept

    def bytes_per_token(self) -> int:
        """On disk, the token itself included."""
        own = sum(width * dtype.itemsize for width, dtype in self.tensors().values())
        return own + torch.int32.itemsize


class TeacherCache:
    """A teacher's answers in a folder.

    Args:
        folder: of a cache that is there; `create` makes one.

    Attributes:
        payload: what it keeps of a token.
        teacher: facts of who answered; the fields are those of its maker.

    Raises:
        CacheError: no cache there, one of another format, or a damaged one.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        facts = sealed_facts(self.folder / "teacher")
        if facts is None:
            raise CacheError(
                f"teacher cache {self.folder}: no whole cache is there; `modxfer cache` fills one"
            )
        if facts.get("format") != FORMAT:
            raise CacheError(
                f"teacher cache {self.folder}: expected format {FORMAT}, got {facts.get('format')}"
            )
        if bad := damaged_files(self.folder / "teacher"):
            raise CacheError(f"teacher cache {self.folder}: teacher is damaged ({', '.join(bad)})")
        self.payload = Payload(**facts["payload"])
        self.teacher: dict[str, Any] = facts["teacher"]
        self._shards: list[_Shard] = []
        self._places: dict[bytes, tuple[int, int]] = {}
        for path in sorted((self.folder / "shards").glob("[!.]*")):  # others are being written
            self._add(path)

    @classmethod
    def create(
        cls,
        folder: str | Path,
        payload: Payload,
        teacher: Mapping[str, Any],
        head: Mapping[str, Tensor],
    ) -> "TeacherCache":
        """A new cache without documents, or the one that is there, if it is of this teacher.

        Args:
            teacher: facts that tell it from others.
            head: tensors that go with hidden states.

        Raises:
            CacheError: the one there is of another teacher or payload.
        """
        folder = Path(folder)
        if not (folder / "teacher").exists():
            with new_folder(folder / "teacher", keep_existing=True) as scratch:
                if head:
                    save_file(
                        {k: v.detach().cpu().contiguous() for k, v in head.items()}, scratch / HEAD
                    )
                facts = {"format": FORMAT, "payload": dataclasses.asdict(payload)}
                seal(scratch, {**facts, "teacher": dict(teacher)})
        cache = cls(folder)
        cache.check_teacher(teacher)
        if cache.payload != payload:
            raise CacheError(f"teacher cache {folder}: expected {payload}, found {cache.payload}")
        return cache

    def check_teacher(self, teacher: Mapping[str, Any]) -> None:
        """Raises a CacheError that names each fact in which another teacher differs."""
        wrong = [
            f"{name}: expected {value}, found {self.teacher.get(name)}"
            for name, value in teacher.items()
            if self.teacher.get(name) != value
        ]
        if wrong:
            raise CacheError(
                f"teacher cache {self.folder} is of another teacher; {'; '.join(wrong)}"
            )

    def head(self) -> dict[str, Tensor]:
        """The tensors of the teacher's head, none where no hidden states are kept."""
        path = self.folder / "teacher" / HEAD
        return load_file(path) if path.is_file() else {}

    # --- reading

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents."""
        return sum(shard.num_tokens for shard in self._shards)

    def read(self, document: Document) -> dict[str, Tensor]:
        """What was answered to a document: {name: [n, width]}, in memory of its own.

        Raises:
            CacheError: it is not there, or what is there has changed since it was written.
        """
        place = self._places.get(document.key)
        if place is None:
            raise CacheError(
                f"teacher cache {self.folder}: no answer to a document of {len(document.ids)} "
                f"tokens (row {document.row} of the batch, from token {document.start} on); "
                "capture it with `modxfer cache`, with the same data, tokenizer and max_length"
            )
        shard, index = self._shards[place[0]], place[1]
        return shard.read(index, document)

    def damaged(self) -> list[str]:
        """Names of shards that are other than they were written. Reads everything."""
        return [shard.path.name for shard in self._shards if damaged_files(shard.path)]

    # --- writing

    def write(self, answers: Sequence[tuple[Document, Mapping[str, Tensor]]]) -> Path:
        """One more shard, complete or absent; of documents that are here already it is the same.

        Args:
            answers: documents and what `Payload.tensors` names of each, [n, width].

        Raises:
            CacheError: numbers that are none, or too large for the dtype that is kept.
        """
        kept = self.payload.tensors()
        tensors: dict[str, Tensor] = {
            "keys": _as_bytes([document.key for document, _ in answers]),
            "lengths": torch.tensor([len(document.ids) for document, _ in answers]),
            "ids": torch.cat([document.ids for document, _ in answers]),
        }
        for name, (width, dtype) in kept.items():
            parts = [own[name] for _, own in answers]
            for (document, _), part in zip(answers, parts, strict=True):
                if part.shape != (len(document.ids), width):
                    raise ValueError(
                        f"{name}: expected shape {(len(document.ids), width)}, "
                        f"got {tuple(part.shape)}"
                    )
            tensors[name] = torch.cat([part.to(dtype).cpu() for part in parts])
            self._check_numbers(name, tensors[name])
        tensors["sums"] = torch.tensor(
            [
                _sum_of(tensors, names=("ids", *kept), span=span)
                for span in _spans(tensors["lengths"])
            ]
        )
        name = hashlib.sha256(tensors["keys"].numpy().tobytes()).hexdigest()[:20]
        path = self.folder / "shards" / name
        is_whole = not path.exists() or sealed_facts(path) is not None
        with new_folder(path, keep_existing=is_whole) as scratch:
            save_file(tensors, scratch / ANSWERS)
            seal(scratch, {"documents": len(answers), "tokens": len(tensors["ids"])})
        self._add(path)
        return path

    def _check_numbers(self, name: str, tensor: Tensor) -> None:
        # minus infinity is the logarithm of a class without a chance
        good = tensor.isfinite() if name == "hidden" else ~(tensor.isnan() | tensor.isposinf())
        if not good.all():
            raise CacheError(
                f"teacher cache {self.folder}: expected answers that are numbers, got {name} with "
                f"{tensor[~good][0].item()} in {str(tensor.dtype).removeprefix('torch.')}; the "
                "teacher gives none, or larger ones than this dtype has"
            )

    def _add(self, path: Path) -> None:
        if sealed_facts(path) is None:  # its marker is damaged: what it holds counts as not there
            return
        shard = _Shard(path, tuple(self.payload.tensors()))
        for index, key in enumerate(shard.keys):
            self._places.setdefault(key, (len(self._shards), index))
        self._shards.append(shard)


class _Shard:
    """A shard that is mapped into memory when it is first read."""

    def __init__(self, path: Path, names: tuple[str, ...]) -> None:
        self.path, self._names = path, names
        self._file: Any = None
        try:
            with safe_open(path / ANSWERS, framework="pt") as file:
                keys, lengths = file.get_tensor("keys"), file.get_tensor("lengths")
                self._sums = file.get_tensor("sums")
                num_ids = file.get_slice("ids").get_shape()[0]
        except (OSError, SafetensorError) as error:
            raise CacheError(
                f"teacher cache, shard {path}: cannot be read ({error}); {_AGAIN}"
            ) from error
        if int(lengths.sum()) != num_ids or (lengths < 0).any():
            raise CacheError(
                f"teacher cache, shard {path}: is damaged, its lengths are others; {_AGAIN}"
            )
        data = keys.numpy().tobytes()
        self.keys = [data[i : i + KEY_BYTES] for i in range(0, len(data), KEY_BYTES)]
        self._starts = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])

    def __getstate__(self) -> dict[str, Any]:  # a worker of a loader maps the file itself
        return {**self.__dict__, "_file": None}

    @property
    def num_tokens(self) -> int:
        return int(self._starts[-1])

    def read(self, index: int, document: Document) -> dict[str, Tensor]:
        span = slice(*self._starts[index : index + 2].tolist())
        names = ("ids", *self._names)
        try:
            if self._file is None:
                self._file = safe_open(self.path / ANSWERS, framework="pt")
            found = {name: self._file.get_slice(name)[span] for name in names}
        except (OSError, SafetensorError, IndexError) as error:
            raise CacheError(f"{self._place(index)}: cannot be read ({error}); {_AGAIN}") from error
        if _sum_of(found, names=names, span=slice(None)) != int(self._sums[index]):
            raise CacheError(
                f"{self._place(index)}: expected the checksum it was written with, got another; "
                f"{_AGAIN}"
            )
        if not torch.equal(found.pop("ids"), document.ids):
            raise CacheError(f"{self._place(index)}: is of other tokens")
        return found

    def _place(self, index: int) -> str:
        return f"teacher cache, shard {self.path}, row {index}"


def _spans(lengths: Tensor) -> Iterator[slice]:
    start = 0
    for length in lengths.tolist():
        yield slice(start, start + length)
        start += length


def _as_bytes(keys: Iterable[bytes]) -> Tensor:
    data = bytearray(b"".join(keys))
    return torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def _sum_of(tensors: Mapping[str, Tensor], names: Iterable[str], span: slice) -> int:
    """CRC-32 of the bytes of rows of several tensors."""
    total = 0
    for name in names:
        own = tensors[name][span].contiguous()
        if own.numel():
            total = zlib.crc32(own.view(-1).view(torch.uint8).numpy().data, total)
    return total

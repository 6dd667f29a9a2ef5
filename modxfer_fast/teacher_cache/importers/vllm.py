"""Hidden states as vLLM's example connector and speculators write them, a file a prompt.

<name>.safetensors         hidden_states [n, layers, D] or [n, D], token_ids [n]
<name>.safetensors.lock    locked (flock) while the other is written; may be absent

vLLM takes states before the final norm, of the layers it was asked for; the last one of them is the
usual one, and has to be the last of the model.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from modxfer_fast.teacher_cache.importers.entries import Entry, Foreign, ImportRefused, TeacherHead
from modxfer_fast.teacher_cache.store import DTYPES, Payload

_HIDDEN, _IDS = "hidden_states", "token_ids"
NORM = "+norm"


class HiddenStatesFiles(Foreign):
    """Files of a folder and below it. Those that are being written are left out, with a note.

    A reading is a layer among those kept, from 0, with "+norm" where the teacher's final norm is
    yet to be applied: "3", "3+norm". The usual one is the last, as it is.
    """

    name = "vllm"

    def __init__(self, path: str | Path, head: TeacherHead) -> None:
        super().__init__(path, head)
        self._files = sorted(self.path.rglob("*.safetensors"))
        if not self._files:
            raise ImportRefused(f"{self.path}: expected a folder of .safetensors files, got none")
        self._layers = 0
        self._locked = set[Path]()

    def entries(self) -> Iterator[Entry]:
        for file in self._files:
            with _unless_written(file) as whole:
                if whole:
                    yield self._entry(file)
                    continue
            if file not in self._locked:
                self._locked.add(file)
                self.notes.append(f"{file} is being written; import again for it")

    def _entry(self, file: Path) -> Entry:
        try:
            kept = load_file(file)
        except (OSError, SafetensorError) as error:
            raise ImportRefused(f"{file}: cannot be read ({error})") from error
        if missing := {_HIDDEN, _IDS} - kept.keys():
            raise ImportRefused(
                f"{file}: expected {_HIDDEN} and {_IDS}, got {', '.join(sorted(kept))}; "
                f"{', '.join(sorted(missing))} is missing"
            )
        hidden, ids = kept[_HIDDEN], kept[_IDS].flatten()
        if hidden.dim() == 2:
            hidden = hidden[:, None]
        width = self.head.weight.shape[1]
        expected = (len(ids), self._layers or hidden.shape[1], width)
        if hidden.shape != expected or not hidden.shape[1]:
            n, layers, _ = expected
            raise ImportRefused(
                f"{file}: expected {_HIDDEN} of shape [{n}, {layers}, {width}], "
                f"got {list(kept[_HIDDEN].shape)}"
            )
        dtype = str(hidden.dtype).removeprefix("torch.")
        if dtype not in DTYPES:
            raise ImportRefused(f"{file}: expected {_HIDDEN} in {', '.join(DTYPES)}, got {dtype}")
        if not hidden.isfinite().all():
            raise ImportRefused(f"{file}: expected finite hidden states, got NaN or infinity")
        if not self._layers:
            self._layers = hidden.shape[1]
            last_first = [str(layer) for layer in reversed(range(self._layers))]
            ends = ("", NORM) if self.head.norm is not None else ("",)
            self.readings = tuple(layer + end for layer in last_first for end in ends)
        return Entry(str(file), ids.int(), {_HIDDEN: hidden})

    def payload(self, entry: Entry) -> Payload:
        hidden = entry.kept[_HIDDEN]
        return Payload(str(hidden.dtype).removeprefix("torch."), hidden.shape[-1])

    @torch.no_grad()
    def answers(self, entry: Entry, reading: str) -> dict[str, Tensor]:
        layer, norm, _ = reading.partition(NORM)
        hidden = entry.kept[_HIDDEN][:, int(layer)]
        if norm:
            assert self.head.norm is not None  # else there is no such reading
            hidden = self.head.norm(hidden.to(self.head.weight.dtype)).to(hidden.dtype)
        return {"hidden": hidden}

    def following(self, entry: Entry, answers: Mapping[str, Tensor]) -> Tensor:
        log_probs = self.head.log_probs(answers["hidden"][:-1])
        return log_probs.gather(-1, entry.ids[1:, None].long())[:, 0]


@contextlib.contextmanager
def _unless_written(file: Path) -> Iterator[bool]:
    """Whether a file is whole; while it is read nobody begins to write it."""
    lock = file.with_name(file.name + ".lock")
    try:
        handle = os.open(lock, os.O_RDONLY)
    except FileNotFoundError:
        yield True
        return
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
    finally:
        os.close(handle)

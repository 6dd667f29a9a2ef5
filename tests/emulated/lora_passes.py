"""The CUDA passes of csrc/cuda as the compiled ops of kernels/lora_linear/cuda_passes.py."""

import dataclasses
from collections.abc import Sequence
from ctypes import (
    POINTER,
    Structure,
    byref,
    c_char_p,
    c_float,
    c_int,
    c_int64,
    c_uint32,
    c_uint64,
    c_void_p,
)

import torch
from torch import Tensor

from tests.emulated import library

_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def _structure(name: str, **fields) -> type[Structure]:
    return type(name, (Structure,), {"_fields_": list(fields.items())})


_Gpu = _structure("Gpu", most_shared=c_int, multiprocessors=c_int)
_Wide = _structure("Wide", data=c_void_p, row_stride=c_int64, column_stride=c_int64)
_Kinds = {"kind": c_int, "adapters": c_int}
_ShrinkTarget = _structure(
    "ShrinkTarget", a=c_void_p, rank=c_int, scale=c_float, threshold=c_uint32
)
_ShrinkCall = _structure(
    "ShrinkCall",
    **_Kinds,
    x=_Wide,
    rows=c_int,
    columns=c_int,
    seed=c_void_p,
    bits=c_void_p,
    s=c_void_p,
)
_DyTarget = _structure(
    "DyTarget",
    dy=_Wide,
    b=c_void_p,
    width=c_int,
    rank=c_int,
    column=c_int,
    scale=c_float,
    ds=c_void_p,
    db=c_void_p,
)
_DsDbCall = _structure(
    "DsDbCall", **_Kinds, rows=c_int, share_rows=c_int, s=c_void_p, sum_ranks=c_int
)
_DaTarget = _structure("DaTarget", ds=c_void_p, mask=c_void_p, rank=c_int, da=c_void_p)
_DaCall = _structure("DaCall", **_Kinds, x=_Wide, rows=c_int, columns=c_int, share_rows=c_int)
_Parts = _structure("Parts", parts=c_void_p, out=c_void_p, size=c_int64, count=c_int)


@dataclasses.dataclass(frozen=True)
class EmulatedOps:
    """The ops of csrc/cuda/lora_passes.cu.

    Attributes:
        multiprocessors: that blocks are planned for; few make blocks of many rows.
        most_shared: KiB of a block; few leave it with few targets.
        seed: of the schedule.
    """

    multiprocessors: int = 132
    most_shared: int = 227
    seed: int = 0
    checked: bool = False

    def lora_shrink_cuda(self, x, lora_a, scales, thresholds, seed, bits, s, stream) -> None:
        call = _ShrinkCall(
            *(_KINDS[x.dtype], _KINDS[s.dtype], _wide(x), *x.shape),
            *(_at(seed), _at(bits), _at(s)),
        )
        columns = zip(lora_a, scales, thresholds, strict=True)
        targets = [_ShrinkTarget(_at(a), len(a), *rest) for a, *rest in columns]
        self._launch("emulated_shrink", call, targets)

    def lora_ds_db_cuda(self, dys, lora_b, columns, scales, s, share_rows, ds, db, stream) -> None:
        sum_ranks = 0 if s is None else s.shape[1]
        kinds = (_KINDS[dys[0].dtype], _KINDS[lora_b[0].dtype])
        call = _DsDbCall(*kinds, len(dys[0]), share_rows, _at(s), sum_ranks)
        targets = [
            _DyTarget(_wide(dy), _at(b), *b.shape, column, scale, _at(ds_), _at(db_))
            for dy, b, column, scale, ds_, db_ in zip(
                dys, lora_b, columns, scales, ds, db, strict=True
            )
        ]
        self._launch("emulated_ds_db", call, targets)

    def lora_da_cuda(self, x, ds, masks, share_rows, parts, stream) -> None:
        kinds = (_KINDS[x.dtype], _KINDS[ds[0].dtype])
        call = _DaCall(*kinds, _wide(x), *x.shape, share_rows)
        targets = [
            _DaTarget(_at(ds_), _at(mask), ds_.shape[1], _at(part))
            for ds_, mask, part in zip(ds, masks, parts, strict=True)
        ]
        self._launch("emulated_da", call, targets)

    def lora_reduce_cuda(self, parts, outs, stream) -> None:
        jobs = [
            _Parts(_at(part), _at(out), out.numel(), len(part))
            for part, out in zip(parts, outs, strict=True)
        ]
        self._launch("emulated_reduce", c_int(_KINDS[outs[0].dtype]), jobs)

    def _launch(self, name: str, call, targets: Sequence[Structure]) -> None:
        kernels = library("emulated_lora_passes.cpp", checked=self.checked)
        kernels.emulator_schedule(c_uint64(self.seed))
        launch = getattr(kernels, name)
        launch.restype = c_char_p
        kinds = (POINTER(type(call)), POINTER(type(targets[0])), c_int, POINTER(_Gpu))
        launch.argtypes = list(kinds)
        gpu = _Gpu(1024 * self.most_shared, self.multiprocessors)
        fault = launch(byref(call), (type(targets[0]) * len(targets))(*targets), len(targets), gpu)
        assert not fault, fault.decode()


def place_of(size: int, rows: int, row: int, chunk: int) -> int:
    """The byte of a tile of numbers of this size at which a chunk of a row begins."""
    return library("emulated_lora_passes.cpp", checked=False).place(size, rows, row, chunk)


def _wide(tensor: Tensor) -> Structure:
    return _Wide(_at(tensor), *tensor.stride())


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()

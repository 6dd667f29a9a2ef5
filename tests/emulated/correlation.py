"""The CUDA kernels of csrc/cuda as a backend of the room correlation."""

import dataclasses
import math
from ctypes import POINTER, Structure, byref, c_char_p, c_int, c_int64, c_uint64, c_void_p

import torch
from torch import Tensor

from modxfer_fast.kernels.correlation import products
from tests.emulated import Matrix, at, library


class _CentreRows(Structure):
    _fields_ = [
        ("x", Matrix),
        *((name, c_void_p) for name in ("mask", "shift")),
        ("centred", Matrix),
        ("partial", c_void_p),
        *((name, c_int) for name in ("rows", "width")),
    ]


class _AddTile(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("tile", "total")),
        ("stride", c_int64),
        *((name, c_int) for name in ("rows", "width")),
    ]


@dataclasses.dataclass(frozen=True)
class Emulated:
    """A backend of correlation, whose kernels run on a schedule of this seed."""

    seed: int = 0
    checked: bool = False

    def correlation_centre(self, x, mask, shift, centred, sums) -> None:
        rows, width = x.shape
        if rows == 0:
            return
        blocks = self._kernels().correlation_centre_blocks(rows)
        partial = torch.full((blocks, 2, width), math.nan, dtype=torch.float64)
        call = _CentreRows(
            *(Matrix.of(x), at(mask), at(shift), Matrix.of(centred), at(partial), rows, width)
        )
        self._launch("emulated_correlation_centre", call)
        sums += partial.sum(0)

    def correlation_product(self, x, y, product) -> None:
        products.product(x, y, product, self._add)

    def correlation_gram(self, x, gram) -> None:
        products.gram(x, gram, self._add)

    def _add(self, tile: Tensor, total: Tensor) -> None:
        call = _AddTile(at(tile), at(total), total.stride(0), *total.shape)
        self._launch("emulated_correlation_add", call)

    def _kernels(self):
        return library("emulated_correlation.cpp", checked=self.checked)

    def _launch(self, name: str, call: Structure) -> None:
        kernels = self._kernels()
        kernels.emulator_schedule(c_uint64(self.seed))
        launch = getattr(kernels, name)
        launch.restype, launch.argtypes = c_char_p, [POINTER(type(call))]
        fault = launch(byref(call))
        assert not fault, fault.decode()

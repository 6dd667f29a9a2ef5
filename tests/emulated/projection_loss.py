"""The CUDA rows of csrc/cuda as a backend of the room projection_loss."""

import dataclasses
import functools
import math
from ctypes import (
    POINTER,
    Structure,
    byref,
    c_char_p,
    c_float,
    c_int,
    c_int64,
    c_uint64,
    c_void_p,
)

import torch
from torch import Tensor

from modxfer_fast.kernels.names import NORMS, ROW_LOSSES
from modxfer_fast.kernels.projection_loss.spec import ProjectionSpec
from modxfer_fast.kernels.projection_loss.stream import stream
from tests.emulated import Matrix, at, library


class _Spec(Structure):
    _fields_ = [
        ("loss", c_int64),
        *((name, c_float) for name in ("beta", "inv_beta")),
        ("norm", c_int64),
        ("norm_eps", c_float),
    ]


class _Rows(Structure):
    _fields_ = [
        *((name, Matrix) for name in ("z", "t")),
        *((name, c_void_p) for name in ("row_weights", "losses")),
        ("dz", Matrix),
        *((name, c_int) for name in ("rows", "width")),
        ("spec", _Spec),
    ]


def plan_of(width: int) -> tuple[int, int]:
    """Fours of a thread's registers, and threads of a row."""
    found = (c_int * 2)()
    library("emulated_projection_loss.cpp", checked=False).planned_rows(width, found)
    return found[0], found[1]


@dataclasses.dataclass(frozen=True)
class Emulated:
    """A backend of projection_loss, whose kernel is launched as it says.

    Attributes:
        fours: of each side in a thread's registers, 0 for rows that are read in each pass.
        threads: of a block.
        seed: of the schedule.
    """

    fours: int | None = None  # of both: as planned
    threads: int | None = None
    seed: int = 0
    checked: bool = False

    def projection_loss_rows(
        self,
        z: Tensor,
        t: Tensor,
        row_weights: Tensor,
        spec: ProjectionSpec,
        dz: Tensor | None,
    ) -> Tensor:
        losses = z.new_full((len(z),), math.nan, dtype=torch.float32)
        if len(z) == 0:
            return losses
        inv_beta = 1.0 / spec.beta if spec.beta else math.inf
        call = _Rows(
            *(Matrix.of(z), Matrix.of(t), at(row_weights), at(losses), Matrix.of(dz)),
            *z.shape,
            _Spec(
                *(ROW_LOSSES.index(spec.loss), spec.beta, inv_beta),
                *(NORMS.index(spec.norm), spec.norm_eps),
            ),
        )
        fours, threads = plan_of(z.shape[1])
        kernels = library("emulated_projection_loss.cpp", checked=self.checked)
        kernels.emulator_schedule(c_uint64(self.seed))
        launch = kernels.emulated_projection_loss
        launch.restype, launch.argtypes = c_char_p, [POINTER(_Rows), c_int, c_int]
        fours = fours if self.fours is None else self.fours
        fault = launch(byref(call), fours, self.threads or threads)
        assert not fault, fault.decode()
        return losses

    @functools.cached_property
    def projection_loss_fwd(self):
        return functools.partial(stream, self.projection_loss_rows)

"""The one place that decides which backend runs a room.

Order of precedence: the `backend=` argument, `use_backend(...)`, `MODXFER_BACKEND`, then the first
backend of `PREFERENCE[device]` that supports the inputs. A backend asked for by name runs or raises
with its reason; only the automatic choice may fall through to the next one.

"cuda" is no automatic choice: until its kernels were timed it runs where it is asked for.

A backend of a room is a module `kernels/<room>/<backend>_impl.py` (`reference.py` for the
reference) with

    available() -> (ok, reason)                      toolchain and import, independent of inputs
    supports(device_type, dtypes) -> (ok, reason)    these inputs

and the functions that `ROOMS` lists.

Public functions resolve once and hand the name to the op as a string, so that forward and backward
agree and compiled graphs carry the choice.
"""

import contextlib
import functools
import importlib
import importlib.util
import warnings
from collections.abc import Iterator
from types import ModuleType

import torch

from modxfer_fast.kernels import env
from modxfer_fast.kernels.names import BACKENDS

# what the module of every backend has; of kd_loss, the row kernels that teachers of linear_kd_loss
# name (linear_kd_loss/teachers.py)
ROOMS = {
    "kd_loss": (
        *("kd_loss_fwd", "kd_loss_bwd", "kd_loss_fwd_bwd"),
        *("kd_loss_stats", "kd_loss_sums", "kd_loss_write"),
        *("topk_kd_loss_fwd", "topk_kd_loss_fwd_bwd"),
        *("cross_entropy_fwd", "cross_entropy_fwd_bwd"),
        "teacher_topk",
    ),
    "linear_kd_loss": ("linear_kd_loss_fwd",),
    "projection_loss": ("projection_loss_fwd", "projection_loss_rows"),
    "relation_loss": ("relation_loss_fwd",),
    "lora_linear": ("lora_linear_fwd", "lora_linear_bwd"),
    "lora_projection_loss": ("lora_projection_loss_linear",),
    "correlation": ("correlation_centre", "correlation_product", "correlation_gram"),
}
PREFERENCE: dict[str, tuple[str, ...]] = {
    "cpu": ("cpp", "reference"),
    "cuda": ("triton", "reference"),
}

_selected: str | None = None


class BackendError(RuntimeError):
    """A backend that was asked for by name cannot run; the message says why."""


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Every room called inside uses backend `name`, or raises `BackendError` if it cannot.

    Args:
        name: "cuda", "triton", "cpp", "reference", or None for the automatic choice.
    """
    global _selected
    check_name(name)
    previous, _selected = _selected, name
    try:
        yield
    finally:
        _selected = previous


@functools.cache
def load(room: str, backend: str) -> ModuleType:
    """The module that implements `room` on `backend`."""
    return importlib.import_module(_module(room, backend))


def _module(room: str, backend: str) -> str:
    name = "reference" if backend == "reference" else f"{backend}_impl"
    return f"{__package__}.{room}.{name}"


@functools.cache
def availability(room: str, backend: str) -> tuple[bool, str]:
    """Whether this installation can run `backend` for `room` at all, and why not."""
    if importlib.util.find_spec(_module(room, backend)) is None:
        return False, f"{room} has no {backend} kernels"
    try:
        return load(room, backend).available()
    except ImportError as error:
        return False, f"cannot be imported: {error}"


def resolve(room: str, *tensors: torch.Tensor, backend: str | None = None) -> str:
    """The backend that will run `room` on `tensors`.

    Raises:
        ValueError: unknown backend name.
        BackendError: the named backend cannot run these inputs, or none can.
    """
    device = tensors[0].device.type
    dtypes = tuple({tensor.dtype: None for tensor in tensors})
    asked = backend or _selected or env.backend()
    check_name(asked)
    candidates = (asked,) if asked else PREFERENCE.get(device, ("reference",))
    name, reasons = _choose(room, candidates, device, dtypes)
    if name is None:
        raise BackendError(f"{room}: no usable backend on {device} for {dtypes}: {reasons}")
    return name


def accelerated(room: str, device: str, dtypes: tuple[torch.dtype, ...]) -> tuple[bool, str]:
    """Whether the automatic choice is more than the reference, and why not.

    True as well when a backend was asked for by name: then that one is wanted, whatever it is.
    """
    if _selected or env.backend():
        return True, ""
    candidates = tuple(name for name in PREFERENCE.get(device, ()) if name != "reference")
    name, reasons = _choose(room, candidates, device, dtypes)
    if name is None:
        return False, f"no fast kernel for {device}: {reasons or 'none is written for it'}"
    return True, ""


def _choose(
    room: str, candidates: tuple[str, ...], device: str, dtypes: tuple[torch.dtype, ...]
) -> tuple[str | None, str]:
    reasons = []
    for name in candidates:
        ok, reason = availability(room, name)
        if not ok and candidates[-1] == "reference":
            _warn_of_reference(name, reason)
        if ok:
            ok, reason = load(room, name).supports(device, dtypes)
        if ok:
            return name, ""
        reasons.append(f"{name}: {reason}")
    return None, "; ".join(reasons)


@functools.cache
def _warn_of_reference(missing: str, reason: str) -> None:
    """Once a process: an installation without the fast kernels works, several times slower."""
    warnings.warn(
        f"modxfer_fast runs its reference implementation, not {missing}: {reason}", stacklevel=2
    )


# What torch.compiler.assume_constant_result sets; calling it imports torch._dynamo, two seconds.
_choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


def table() -> dict[str, dict[str, dict[str, bool | str]]]:
    """Every room and backend with its availability, as `modxfer doctor` prints it."""
    return {
        room: {
            backend: dict(zip(("available", "reason"), availability(room, backend), strict=True))
            for backend in BACKENDS
        }
        for room in ROOMS
    }


def check_name(name: str | None) -> None:
    """Raises ValueError for what is no name of a backend."""
    if name is not None and name not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {name!r}")

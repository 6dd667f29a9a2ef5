"""What this machine can run: versions, devices, and the backends of each room with reasons."""

from typing import Any

import torch

from modxfer_fast import __version__
from modxfer_fast.errors import UserError
from modxfer_fast.jobs.store import cache_root
from modxfer_fast.kernels import dispatch
from modxfer_fast.kernels.common import compiled, instruction_sets
from modxfer_fast.measure.environment import version

_ENGINE = ("transformers", "accelerate", "deepspeed", "peft", "datasets")
_MISSING = "not installed; pip install 'modxfer-fast[engine]'"


def collect() -> dict[str, Any]:
    """The facts, as JSON-like values.

    Returns:
        {"version", "torch", "triton", "engine", "cache", "devices", "cpu_isa", "rooms"}: engine is
        {package: version} of what the engine stands on, null as triton's is where it is not
        installed; cache is the folder that jobs keep models in; devices are one string each, the
        CPU first; cpu_isa is {"in_use": str, "has": [str]}, the instruction sets of the C++
        kernels, null where they are not built; rooms is {room: {backend: {"available": bool,
        "reason": str}}}.
    Raises:
        UserError: MODXFER_CPU_ISA names no instruction set of this processor.
    """
    try:
        is_built, _ = compiled.available()
    except ValueError as error:
        raise UserError(str(error)) from error
    cpu_isa = None
    if is_built:
        has = list(instruction_sets.of_this_processor())
        cpu_isa = {"in_use": instruction_sets.in_use(), "has": has}

    devices = [f"cpu ({torch.get_num_threads()} threads)"]
    devices += [
        f"cuda:{index} ({torch.cuda.get_device_name(index)})"
        for index in range(torch.cuda.device_count())
    ]
    return {
        "version": __version__,
        "torch": torch.__version__,
        "triton": version("triton"),
        "engine": {name: version(name) for name in _ENGINE},
        "cache": str(cache_root()),
        "devices": devices,
        "cpu_isa": cpu_isa,
        "rooms": dispatch.table(),
    }


def table(facts: dict[str, Any]) -> str:
    """The same for people."""
    lines = [
        f"{name:<12} {facts[name] or 'not installed'}" for name in ("version", "torch", "triton")
    ]
    lines += [f"{name:<12} {has or _MISSING}" for name, has in facts["engine"].items()]
    lines += [f"{'cache':<12} {facts['cache']}", f"{'devices':<12} {', '.join(facts['devices'])}"]
    if (isa := facts["cpu_isa"]) is not None:
        lines.append(f"{'cpu isa':<12} {isa['in_use']} of {', '.join(isa['has'])}")
    rooms = facts["rooms"]
    width = max((len(room) for room in rooms), default=0)
    for room, backends in rooms.items():
        lines.append("")
        for backend, state in backends.items():
            mark = "yes" if state["available"] else "no"
            lines.append(f"{room:<{width}}  {backend:<10} {mark:<4} {state['reason']}".rstrip())
    return "\n".join(lines)

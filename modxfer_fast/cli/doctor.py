"""`modxfer doctor`: what this machine can run."""

import argparse
import importlib.metadata
import json
from typing import Any

_ENGINE = ("transformers", "accelerate", "deepspeed", "peft", "datasets")
_MISSING = "not installed; pip install 'modxfer-fast[engine]'"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


def run(args: argparse.Namespace) -> int:
    facts = collect()
    if args.json:
        print(json.dumps(facts, indent=2))
    else:
        _print(facts)
    return 0


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
    import torch

    from modxfer_fast import __version__
    from modxfer_fast.errors import UserError
    from modxfer_fast.jobs.store import cache_root
    from modxfer_fast.kernels import dispatch
    from modxfer_fast.kernels.common import compiled, instruction_sets

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
        "triton": _installed("triton"),
        "engine": {name: _installed(name) for name in _ENGINE},
        "cache": str(cache_root()),
        "devices": devices,
        "cpu_isa": cpu_isa,
        "rooms": dispatch.table(),
    }


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _print(facts: dict[str, Any]) -> None:
    for name in ("version", "torch", "triton"):
        print(f"{name:<12} {facts[name] or 'not installed'}")
    for name, version in facts["engine"].items():
        print(f"{name:<12} {version or _MISSING}")
    print(f"{'cache':<12} {facts['cache']}")
    print(f"{'devices':<12} {', '.join(facts['devices'])}")
    if (isa := facts["cpu_isa"]) is not None:
        print(f"{'cpu isa':<12} {isa['in_use']} of {', '.join(isa['has'])}")
    rooms = facts["rooms"]
    width = max((len(room) for room in rooms), default=0)
    for room, backends in rooms.items():
        print()
        for backend, state in backends.items():
            mark = "yes" if state["available"] else "no"
            print(f"{room:<{width}}  {backend:<10} {mark:<4} {state['reason']}".rstrip())

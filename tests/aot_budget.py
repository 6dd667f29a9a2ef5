"""The committed resources of the core cases of `aot.py`, and what decides that they still hold.

`aot_budget.json` has registers, shared memory and spills by target and case, with a hash of all
that Triton's compiler gets: code of the kernel and of what it calls, signature, constants, options.
A case with the same hash and Triton is not compiled again.
"""

import ast
import dataclasses
import hashlib
import inspect
import json
import textwrap
from pathlib import Path

import triton
from triton.runtime.jit import JITFunction

FILE = Path(__file__).with_suffix(".json")


def hash_of(function: JITFunction, specialization: str) -> str:
    """Of a kernel and Triton's description of a launch; comments, line numbers and paths left out.

    `specialization` is the JSON that Triton gives to hooks of its cache.
    """
    given = json.loads(specialization)
    del given["key"], given["options"]["extern_libs"]
    text = json.dumps([_code(function, {}), given], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _code(function: JITFunction, seen: dict[str, str]) -> dict[str, str]:
    """Source of a function, of the functions that it calls, and the globals that they read."""
    name = f"{function.fn.__module__}.{function.fn.__qualname__}"
    if name not in seen:
        seen[name] = ast.unparse(ast.parse(textwrap.dedent(inspect.getsource(function.fn))))
        for read in function.fn.__code__.co_names:
            value = function.fn.__globals__.get(read)
            if isinstance(value, JITFunction):
                _code(value, seen)
            elif isinstance(value, int | float | str | triton.language.constexpr):
                seen[f"{name}: {read}"] = repr(value)
    return seen


class Budget:
    """What the file says, and what a run finds in its place."""

    def __init__(self) -> None:
        kept = json.loads(FILE.read_text()) if FILE.exists() else {}
        self._kept = kept if kept.get("triton") == triton.__version__ else {}
        self._found = {}

    def entry(self, target: str, name: str) -> dict:
        """Hash and resources of a case; empty without any of this Triton."""
        return self._kept.get(target, {}).get(name, {})

    def record(self, target: str, name: str, digest: str, resources) -> None:
        entry = {"hash": digest, **dataclasses.asdict(resources)}
        self._found.setdefault(target, {})[name] = entry

    def write(self) -> None:
        """What was recorded becomes the file, a case a line."""
        parts = [f'"triton": {json.dumps(triton.__version__)}']
        for target, entries in self._found.items():
            lines = (f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in sorted(entries.items()))
            parts.append(f"{json.dumps(target)}: {{\n" + ",\n".join(lines) + "\n}")
        FILE.write_text("{\n" + ",\n".join(parts) + "\n}\n")

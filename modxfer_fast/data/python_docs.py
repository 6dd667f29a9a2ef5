"""`python-docs`: a corpus every Python carries, so that a first run needs no network.

One document per topic of `pydoc_data.topics` (the language reference) and one per module of the
standard library (its docstrings in source order). Sources are parsed, never imported. The result
depends on the Python version alone: files are visited in sorted order, a docstring that was seen
before is left out, so no text can appear in both halves of a split by document.
"""

import ast
import sysconfig
from collections.abc import Iterator
from pathlib import Path

_SKIPPED_FOLDERS = frozenset(
    {"__pycache__", "idle_test", "lib2to3", "pydoc_data", "site-packages", "dist-packages"}
    | {"test", "tests", "turtledemo"}
)
# Shorter docstrings ("See base class.") are boilerplate.
_MIN_DOCSTRING_CHARS = 40
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def python_docs() -> list[str]:
    """The documents: topics by name, then modules by path."""
    from pydoc_data.topics import topics

    documents = list(dict.fromkeys(topics[name] for name in sorted(topics)))
    seen: set[str] = set()
    for path in _stdlib_sources():
        fresh = []
        for docstring in _docstrings(path):
            if len(docstring) >= _MIN_DOCSTRING_CHARS and docstring not in seen:
                seen.add(docstring)
                fresh.append(docstring)
        if fresh:
            documents.append("\n\n".join(fresh))
    return documents


def _stdlib_sources() -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if not _SKIPPED_FOLDERS.intersection(relative.parts):
            found.append((relative.as_posix(), path))
    return [path for _, path in sorted(found)]


def _docstrings(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # a template or a file of another Python version
        return
    for node in ast.walk(tree):
        if isinstance(node, _DOCUMENTED):
            docstring = ast.get_docstring(node)
            if docstring:
                yield docstring

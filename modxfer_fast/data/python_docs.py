"""`python-docs`: a corpus every Python carries, so that a first run needs no network.

One document per topic of `pydoc_data.topics` (the language reference) and one per module of the
standard library (its docstrings in source order). Sources are parsed, never imported. The result
depends on the Python version alone: files are visited in sorted order. A paragraph that was seen
before is left out, unless it is short, so the halves of a split by document share no text.
"""

import ast
import sysconfig
from collections.abc import Iterator
from pathlib import Path

_SKIPPED_FOLDERS = frozenset(
    {"__pycache__", "idle_test", "lib2to3", "pydoc_data", "site-packages", "dist-packages"}
    | {"test", "tests", "turtledemo"}
)
# A paragraph this long does not occur twice by chance; topics quote one another.
_MIN_UNIQUE_CHARS = 60
# Shorter docstrings ("See base class.") are boilerplate.
_MIN_DOCSTRING_CHARS = 40
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def python_docs() -> list[str]:
    """The documents: topics by name, then modules by path."""
    from pydoc_data.topics import topics

    texts = [topics[name] for name in sorted(topics)]
    for path in _stdlib_sources():
        docstrings = dict.fromkeys(d for d in _docstrings(path) if len(d) >= _MIN_DOCSTRING_CHARS)
        texts.append("\n\n".join(docstrings))
    seen: set[str] = set()
    documents = (_without_repeats(text, seen) for text in texts)
    return list(dict.fromkeys(document for document in documents if document.strip()))


def _without_repeats(text: str, seen: set[str]) -> str:
    """`text` less its paragraphs that are in `seen`, which receives the others."""
    fresh = []
    for paragraph in text.split("\n\n"):
        key = " ".join(paragraph.split())
        if len(key) < _MIN_UNIQUE_CHARS or key not in seen:
            seen.add(key)
            fresh.append(paragraph)
    return "\n\n".join(fresh)


def _stdlib_sources() -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = (path.relative_to(root) for path in root.rglob("*.py"))
    kept = (path for path in paths if not _SKIPPED_FOLDERS.intersection(path.parts))
    return [root / path for path in sorted(kept, key=Path.as_posix)]


def _docstrings(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # a template or a file of another Python version
        return
    for node in ast.walk(tree):
        if isinstance(node, _DOCUMENTED) and (docstring := ast.get_docstring(node)):
            yield docstring

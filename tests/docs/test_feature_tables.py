"""docs/features.md: every line of ours names a test that is there."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
LINES = (ROOT / "docs" / "features.md").read_text(encoding="utf-8").splitlines()


def tables() -> list[list[dict[str, str]]]:
    """Rows by the heads of their columns."""
    found: list[list[dict[str, str]]] = []
    head: list[str] = []
    for line in LINES:
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if not line.startswith("|"):
            head = []
        elif not head:
            head = cells
            found.append([])
        elif not re.fullmatch(r"[|-]+", line):
            assert len(cells) == len(head), line
            found[-1].append(dict(zip(head, cells, strict=True)))
    return found


def functions_of(path: Path) -> set[str]:
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return {node.name for node in body if isinstance(node, ast.FunctionDef)}


def test_what_we_can_do_is_proved_by_a_test_that_is_there():
    rows = [row for table in tables() for row in table]
    assert len(rows) > 40
    known: dict[str, set[str]] = {}
    for row in rows:
        named = re.fullmatch(r"`([\w/]+\.py)::(test_\w+)`", row["test"])
        if named is None:
            assert row.get("ours") == "–", row  # what we cannot do needs none
            assert row["test"] == "", row
            continue
        path, function = named.groups()
        if path not in known:
            known[path] = functions_of(ROOT / "tests" / path)
        assert function in known[path], row

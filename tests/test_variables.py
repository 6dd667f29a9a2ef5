"""One table names every environment variable."""

import re
from pathlib import Path

from modxfer_fast.kernels.env import VARIABLES

ROOT = Path(__file__).parents[1]
OURS = re.compile(r"\bMODXFER_[A-Z]+(?:_[A-Z]+)*\b")


def test_the_table_has_every_variable_that_the_code_reads():
    table = ROOT / "kernels" / "env.py"
    readers = [ROOT / "setup.py", *(ROOT / "benchmarks").rglob("*.sh")]
    for folder in ("kernels", "modxfer_fast", "benchmarks"):
        readers += (ROOT / folder).rglob("*.py")
    named = set(re.findall(OURS, table.read_text().rpartition("}\n")[2]))
    for path in {*readers} - {table}:
        named |= set(OURS.findall(path.read_text()))
    assert named == {name for name in VARIABLES if OURS.fullmatch(name)}

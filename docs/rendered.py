"""What pages of the site take from the code and the README instead of repeating it."""

import inspect
import re
from pathlib import Path

from mkdocs.structure.files import File

from modxfer_fast.config.reference import JOBS, sections
from modxfer_fast.kernels.divergences import DIVERGENCES
from modxfer_fast.kernels.env import VARIABLES

ROOT = Path(__file__).parents[1]


def on_files(files, config, **_):
    """Called by mkdocs with the files of the site: adds the pictures of the results."""
    results = ROOT / "benchmarks" / "results"
    for path in sorted(results.rglob("*.png")):
        uri = f"results/{path.relative_to(results).as_posix()}"
        files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_) -> str:
    """Called by mkdocs with every page: `<!-- name: argument -->` becomes what `RENDER` makes."""
    return re.sub(r"<!-- (\w+): (.+?) -->", lambda match: RENDER[match[1]](match[2]), markdown)


def readme(heading: str) -> str:
    """What the README says under a heading, its links as from docs/."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", text, re.M | re.S)[1]
    return section.strip().replace("](docs/", "](")


def variables(_: str) -> str:
    """Every environment variable."""
    rows = [f"| `{name}` | {default} | {use} |" for name, (default, use) in VARIABLES.items()]
    return "\n".join(["| variable | not set | what it does |", "|---|---|---|", *rows])


def schema(job: str) -> str:
    """All sections of a job file."""
    parts = []
    for path, section, keys in sections(JOBS[job]):
        parts.append(f"### `{path}`\n" if path else "### The file itself\n")
        parts.append(f"{meaning(section)}\n")
        parts.append("| key | type | default |\n|---|---|---|")
        parts += [f"| `{key}` | {kind} | {default} |" for key, kind, default in map(cells, keys)]
        parts.append("")
    return "\n".join(parts)


def divergences(_: str) -> str:
    """A line for each of the divergences' records."""
    lines = []
    for name, record in DIVERGENCES.items():
        read = (("alpha", record.alpha), ("beta", record.beta))
        lines.append(
            f"- `{name}`: {record.formula}"
            + "".join(
                f"; {parameter} {of_record.text}, {of_record.default:g} when not given"
                for parameter, of_record in read
                if of_record is not None
            )
        )
    return "\n".join(lines)


def meaning(section: type) -> str:
    """The docstring of a section, its `key: meaning` lines as a list."""
    lines = []
    for line in (inspect.getdoc(section) or "").splitlines():
        key = re.match(r"(\w+(?:, \w+)*): (.*)", line)
        if key and lines and lines[-1] and not lines[-1].startswith(("- ", "  ")):
            lines.append("")
        lines.append(f"- `{key[1]}`: {key[2]}" if key else line.replace("    ", "  ", 1))
    return "\n".join(lines)


def cells(key: tuple[str, str, str]) -> tuple[str, str, str]:
    """Key, type and default for a table, whose cells a bar would end."""
    name, kind, default = key
    default = default.removeprefix(", ").removeprefix("by default ")
    return name, kind.replace("|", "\\|"), default.replace("|", "\\|")


RENDER = {"divergences": divergences, "readme": readme, "schema": schema, "variables": variables}

"""README and docs: their code compiles, their commands parse, their links lead somewhere."""

import argparse
import importlib
import re
import shlex
from pathlib import Path

import pytest
import yaml

from modxfer_fast.cli.main import add_arguments

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


def test_the_pages_are_found():
    assert {"README.md", "CONTRIBUTING.md", "transfer.md"} <= {page.name for page in PAGES}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_code_compiles(page):
    for block in blocks(page, "python"):
        compile(block, str(page), "exec")
    for block in blocks(page, "yaml"):
        yaml.safe_load(block)


def commands(page: Path) -> list[list[str]]:
    """Arguments of every `modxfer` on an indented line, continued lines joined."""
    text = re.sub(r"\\\n\s*", " ", page.read_text(encoding="utf-8"))
    found = re.findall(r"^    (?!#).*?\bmodxfer ([a-z]+ .*|[a-z]+)$", text, re.MULTILINE)
    return [shlex.split(line, comments=True) for line in found]


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_parse(page):
    for command, *arguments in commands(page):
        parser = argparse.ArgumentParser(prog=command)
        add_arguments(importlib.import_module(f"modxfer_fast.cli.{command}"), parser)
        parser.parse_args(arguments)


def test_commands_are_found():
    assert ["distill", "examples/quickstart.yaml"] in commands(ROOT / "README.md")


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page):
    for target in re.findall(
        r"\]\((?!https?:|mailto:|#)([^)#]+)", page.read_text(encoding="utf-8")
    ):
        # pictures of results are added to the site under results/
        places = (page.parent / target, ROOT / "benchmarks" / target)
        assert any(place.exists() for place in places), f"{page.name}: {target}"

"""What the package says about itself in several places is the same."""

import re
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_description_is_the_first_sentence_of_the_readme():
    text = (ROOT / "README.md").read_text().partition("\n\n")[2]
    sentence = re.split(r"\.\s", " ".join(text.split()), maxsplit=1)[0]
    assert PROJECT["description"] == sentence


def test_the_citation_names_the_software_and_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    for key in ("cff-version", "message", "title", "authors"):  # what the format demands
        assert citation[key]
    assert citation["license"] == PROJECT["license"]
    (paper,) = citation["references"]
    assert len(paper["authors"]) == 3
    assert paper["url"].endswith(paper["identifiers"][0]["value"].removeprefix("arXiv:"))

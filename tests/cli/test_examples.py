"""The job files a user copies are valid, and do what they say."""

from pathlib import Path

import pytest

from modxfer_fast.cli.job import check_open_sections
from modxfer_fast.config import load_config

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.yaml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_is_valid(path):
    check_open_sections(load_config(path))


def test_the_examples_share_one_cached_teacher():
    quickstart, lora, hidden = (
        load_config(next(path for path in EXAMPLES if path.stem == name))
        for name in ("quickstart", "lora_student", "lora_hidden")
    )
    for section in ("tokenizer", "data", "teacher"):
        assert getattr(quickstart, section) == getattr(lora, section) == getattr(hidden, section)
    assert lora.student.config == quickstart.student.config
    assert lora.student.peft is not None
    assert lora.student.fuses_lora
    assert not quickstart.student.fuses_lora
    # one pretrained backbone for both LoRA students
    assert (hidden.student.config, hidden.student.pretrain) == (
        lora.student.config,
        lora.student.pretrain,
    )
    assert hidden.loss.hidden_states.layers == {1: 3, 2: 6}
    assert hidden.compare.parts

"""Models in folders."""

import pytest

from modxfer_fast.config.model import PretrainedSection
from tests.task_inputs import tiny_bert, word_tokenizer


@pytest.fixture
def encoder(tmp_path) -> PretrainedSection:
    tiny_bert(word_tokenizer(tmp_path)).save_pretrained(tmp_path / "encoder")
    return PretrainedSection(path=str(tmp_path / "encoder"))

"""Jobs whose teacher reads prompts of its own."""

import pytest

from modxfer_fast.config import ConfigError, JobConfig
from modxfer_fast.config.loading import validate

PROMPTED = {"source": "asked.jsonl", "teacher_prompt": "hint"}
JOB = {
    "output_dir": "out",
    "data": PROMPTED,
    "teacher": {"path": "some/teacher"},
    "student": {"path": "some/student"},
}
TWO = {"a": {"path": "some/a"}, "b": {"path": "some/b"}}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"teacher": {"plan": "self"}, "student": {"path": "s", "peft": {"r": 2}}},
        {"teacher": None, "teachers": TWO},
        {"on_policy": {}},
    ],
)
def test_teachers_that_read_them(changes):
    validate({**JOB, **changes}, JobConfig, "")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"teacher": {"path": "t", "plan": "cached"}},
            "teacher.plan: cached: expected nothing with data.teacher_prompt",
        ),
        (
            {"loss": {"relations": {"layers": {1: 1}}}},
            "loss.relations: expected nothing with data.",
        ),
        (
            {"compare": {"loss_rows": 8}},
            "compare.loss_rows: expected nothing with data.teacher_pro",
        ),
        (
            {"teacher": None, "teachers": TWO, "data": {**PROMPTED, "teacher_column": "whose"}},
            "data.teacher_column: expected nothing with data.teacher_prompt",
        ),
        (
            {"data": {"sources": [PROMPTED, {"source": "b"}]}},
            "expected a teacher_prompt for each or for none, b has none",
        ),
    ],
)
def test_what_cannot_be(changes, message):
    with pytest.raises(ConfigError) as error:
        validate({**JOB, **changes}, JobConfig, "")
    assert message in str(error.value)

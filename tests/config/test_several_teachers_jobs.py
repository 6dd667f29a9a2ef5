"""Jobs with teachers in place of one teacher."""

import pytest
import yaml

from modxfer_fast.config import ConfigError, dump_config, load_config

TWO = {"code": {"path": "some/code"}, "chat": {"path": "some/chat", "plan": "zero3"}}
ROUTED = {"source": "texts.jsonl", "teacher_column": "whose"}
JOB = {
    "output_dir": "out",
    "data": {"source": "texts.jsonl"},
    "teachers": TWO,
    "student": {"path": "some/student"},
}


@pytest.fixture
def load(tmp_path):
    def load(changes):
        path = tmp_path / "job.yaml"
        path.write_text(yaml.safe_dump({**JOB, **changes}, sort_keys=False))
        return load_config(path)

    return load


@pytest.mark.parametrize("data", [JOB["data"], ROUTED])
def test_a_file_that_was_written_says_the_same(load, tmp_path, data):
    config = load({"data": data})
    assert config.is_routed == (data is ROUTED)
    assert list(config.teacher_sections) == ["teachers.code", "teachers.chat"]
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "again.yaml") == config


def test_sources_that_name_their_teachers(load):
    sources = [{"source": "a", "teacher": "chat"}, {"source": "b", "teacher_column": "whose"}]
    assert load({"data": {"sources": sources}}).is_routed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teachers": None}, "teacher: expected exactly one of teacher and teachers, got neither"),
        ({"teacher": {"path": "t"}}, "expected exactly one of teacher and teachers, got both"),
        ({"teachers": {}}, "teachers: "),
        ({"teachers": {"a/b": {"path": "t"}}}, "teachers.a/b"),
        (
            {"teachers": {"code": {"pth": "t"}}},
            "teachers.code.pth: unknown key; did you mean 'path'",
        ),
        ({"teachers": {"code": {"path": "t", "weight": 0}}}, "teachers.code.weight: "),
        (
            {
                "teachers": {
                    **TWO,
                    "it": {"path": "t", "plan": "cached", "cache": {"hidden": False, "top_k": 9}},
                }
            },
            "mixture_of: expected losses with teachers.it, of which some classes are known",
        ),
        (
            {"teachers": {**TWO, "it": {"path": "t", "plan": "cached"}}, "on_policy": {}},
            "teacher.plan: expected one that answers now, with on_policy",
        ),
        (
            {"teachers": {**TWO, "it": {"plan": "self"}}},
            "student.peft: expected adapters with teacher.plan: self",
        ),
        ({"mixture_of": "logits"}, "mixture_of: "),
        ({"kind": "encoder"}, "kind: expected nothing with teachers"),
        ({"loss": {"relations": {"layers": {1: 1}}}}, "loss.relations: expected nothing with"),
        ({"loss": {"impl": "dense"}}, "loss.impl: expected fused with teachers, got dense"),
        (
            {"loss": {"divergence": "logits_mse"}},
            "mixture_of: expected losses with a divergence of",
        ),
        ({"compare": {"parts": True}}, "compare.parts: expected nothing with teachers"),
        (
            {"student": {"from_teacher": {"layers": [0]}}},
            "student.from_teacher: expected nothing with teachers",
        ),
        (
            {"data": ROUTED, "teachers": {**TWO, "b": {"path": "t", "weight": 2.0}}},
            "teachers.weight: expected nothing where the data names the teacher",
        ),
        ({"data": ROUTED, "mixture_of": "losses"}, "mixture_of: expected nothing where the data"),
        (
            {"data": {"sources": [{"source": "a", "teacher": "chat"}, {"source": "b"}]}},
            "expected a teacher or a teacher_column for each or for none, b has none",
        ),
        (
            {"data": {"sources": [{"source": "a", "teacher": "cat"}]}},
            "data.sources: a: teacher: expected one of code, chat, got cat",
        ),
        (
            {"data": {"sources": [{"source": "a", "teacher": "chat", "teacher_column": "c"}]}},
            "expected a teacher or a teacher_column, a has both",
        ),
        (
            {"teachers": None, "teacher": {"path": "t"}, "data": ROUTED},
            "data.teacher_column: expected nothing without teachers",
        ),
        (
            {"teachers": None, "teacher": {"path": "t"}, "mixture_of": "losses"},
            "mixture_of: expected nothing without teachers",
        ),
        (
            {"teachers": {"a": {"config": {"model_type": "llama"}}}},
            "tokenizer: expected a section",
        ),
    ],
)
def test_what_cannot_be(load, changes, message):
    with pytest.raises(ConfigError) as error:
        load(changes)
    assert message in str(error.value)

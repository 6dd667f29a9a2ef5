"""Jobs with kind: encoder, and students that start from their teacher."""

import pytest
import yaml

from modxfer_fast.config import ConfigError, dump_config, load_config

JOB = {
    "kind": "encoder",
    "output_dir": "out",
    "data": {"source": "python-docs"},
    "teacher": {"path": "some/teacher"},
    "student": {"from_teacher": {"layers": [0, 2]}},
    "loss": {"hidden_states": {"layers": {1: 2}}},
}


@pytest.fixture
def load(tmp_path):
    def load(job):
        path = tmp_path / "job.yaml"
        path.write_text(job if isinstance(job, str) else yaml.safe_dump(job))
        return load_config(path)

    return load


def test_what_is_not_given_suits_an_encoder(load):
    config = load(JOB)
    assert (config.data.packing, config.data.max_length) == (False, 512)
    assert (config.loss.kd_weight, config.loss.ce_weight) == (0.0, 0.0)
    assert config.student.from_teacher.embeddings == "copy"
    assert load(dump_config(config)) == config
    assert load({**JOB, "data": {"source": "s", "max_length": 64}}).data.max_length == 64


def test_causal_jobs_keep_their_defaults(load):
    config = load({**JOB, "kind": "causal_lm"})
    assert (config.data.packing, config.data.max_length, config.loss.kd_weight) == (True, 1024, 1.0)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"kind": "decoder"}, "kind: Input should be 'causal_lm' or 'encoder'"),
        ({"loss": {"kd_weight": 1.0, **JOB["loss"]}}, "loss.kd_weight: expected 0 or nothing with"),
        ({"loss": {"ce_weight": 0.5, **JOB["loss"]}}, "loss.ce_weight: expected 0 or nothing with"),
        (
            {"loss": {"temperature": 2.0}},
            "loss.hidden_states: expected a section with kind: encoder",
        ),
        (
            {"loss": {"hidden_states": {"layers": {1: 1}, "tokens": "labels"}}},
            "loss.hidden_states.tokens: expected all",
        ),
        ({"data": {"source": "s", "packing": True}}, "data.packing: expected false"),
        ({"data": {"source": "s", "format": "messages"}}, "data.format: expected text"),
        ({"tokenizer": {"vocab_size": 500}}, "tokenizer.vocab_size: expected a path"),
        ({"teacher": {"config": {"model_type": "bert"}}}, "teacher.path: missing"),
        ({"compare": {"ce_only": True}}, "compare.ce_only: expected nothing"),
        ({"compare": {"loss_rows": 8}}, "compare.loss_rows: expected nothing"),
        (
            {"student": {"config": {"model_type": "bert"}, "pretrain": {"max_steps": 1}}},
            "student.pretrain: expected nothing",
        ),
        ({"student": {"path": "s", "peft": {"r": 1}}}, "student.peft: expected nothing"),
        (
            {"student": {"path": "s", "from_teacher": {"layers": [0]}}},
            "student: expected exactly one of path and config",
        ),
        (
            {"student": {"from_teacher": {"embeddings": "pca", "layers": [0]}}},
            "layers: expected none with embeddings: pca",
        ),
        (
            {"student": {"from_teacher": {"embeddings": "none"}}},
            "layers: expected at least one where embeddings is none",
        ),
        ({"student": {"from_teacher": {"layers": [-1]}}}, "student.from_teacher.layers.0"),
        (
            {"student": {"from_teacher": {"layer": [1]}}},
            "student.from_teacher.layer: unknown key; did you mean 'layers'?",
        ),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value[:45],
)
def test_mistakes_are_named(load, sections, message):
    with pytest.raises(ConfigError) as caught:
        load({**JOB, **sections})
    assert message in str(caught.value)

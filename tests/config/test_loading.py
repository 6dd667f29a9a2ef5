"""YAML -> JobConfig: every mistake is named with its place, its expectation and what came."""

import pytest
import yaml

from modxfer_fast.config import ConfigError, as_dict, dump_config, load_config

MINIMAL = {
    "output_dir": "out",
    "data": {"source": "python-docs"},
    "teacher": {"path": "some/teacher"},
    "student": {"path": "some/student"},
}


@pytest.fixture
def write(tmp_path):
    def write(content, name="job.yaml"):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return path

    return write


def changed(**sections):
    return {**MINIMAL, **sections}


def test_defaults_and_given_values(write):
    config = load_config(write(changed(loss={"temperature": 2, "divergence": "jsd"})))
    assert config.seeds == [0]
    assert config.loss.temperature == 2.0
    assert config.loss.kd_weight == 1.0
    assert config.compare.ce_only is False


def test_exponent_without_a_dot_is_a_number(write):
    path = write("output_dir: o\ndata: {source: s}\nteacher: {path: t}\nstudent: {path: s}\n"
                 "training: {learning_rate: 1e-3, weight_decay: 1E-2}\n")  # fmt: skip
    assert load_config(path).training == {"learning_rate": 1e-3, "weight_decay": 1e-2}


def test_no_is_a_word_and_false_is_not(write):
    path = write(
        "output_dir: o\noverwrite: true\ndata: {source: s, packing: False}\n"
        "teacher: {path: t}\nstudent: {path: s}\ntraining: {save_strategy: no}\n"
    )
    config = load_config(path)
    assert config.training == {"save_strategy": "no"}
    assert (config.overwrite, config.data.packing) == (True, False)
    assert load_config(write(dump_config(config), "again.yaml")) == config


def test_secrets_leave_no_trace(write):
    secret = {"push_to_hub": True, "hub_token": "hf_secret"}
    config = load_config(write(changed(training=secret)))
    assert config.training == secret
    for text in (dump_config(config), str(as_dict(config))):
        assert "hf_secret" not in text
        assert "push_to_hub" in text


def test_dump_reads_back_the_same(write):
    config = load_config(write(changed(training={"max_steps": 3}, seeds=[4, 5])))
    assert load_config(write(dump_config(config), "again.yaml")) == config


@pytest.mark.parametrize(
    ("content", "fragments"),
    [
        (changed(loss={"temprature": 2.0}), ["loss.temprature", "did you mean 'temperature'"]),
        (changed(studnet={}), ["studnet", "did you mean 'student'"]),
        (
            changed(student={"path": "s", "lora": {"r": 2}}),
            ["student.lora", "did you mean 'peft'"],
        ),
        (changed(loss={"temperature": "hot"}), ["loss.temperature", "valid number", "'hot'"]),
        (changed(loss={"temperature": -1.0}), ["loss.temperature", "greater than 0", "-1.0"]),
        (changed(loss={"temperature": 0.0}), ["loss.temperature", "greater than 0", "0.0"]),
        (changed(loss={"divergence": "jsd", "beta": 1.5}), ["loss", "beta", "[0, 1]", "1.5"]),
        (changed(loss={"beta": 0.5}), ["loss", "beta", "'jsd' or 'alpha_beta' alone"]),
        (
            changed(loss={"hidden_states": {"layers": {1: 1}, "beta": 0.5}}),
            ["loss.hidden_states", "beta", "smooth_l1 alone", "mse"],
        ),
        (changed(loss={"divergence": "kl"}), ["loss.divergence", "'forward_kl'", "'kl'"]),
        (changed(loss={"backend": "fast"}), ["loss.backend", "'reference'", "'fast'"]),
        (changed(loss={"kd_weight": 0}), ["loss.kd_weight", "nothing would be learnt"]),
        (changed(seeds=[]), ["seeds", "at least 1"]),
        (changed(seeds=[-1]), ["seeds.0", "greater than or equal to 0", "-1"]),
        (changed(data={"source": "x", "split_seed": -1}), ["data.split_seed", "-1"]),
        (changed(seeds=[1, 1]), ["seeds", "different", "[1, 1]"]),
        (changed(overwrite="yes please"), ["overwrite", "valid boolean", "'yes please'"]),
        (changed(data={}), ["data", "exactly one of source and sources, got neither"]),
        (changed(data={"source": "x", "eval_fraction": 1.0}), ["data.eval_fraction", "less"]),
        (changed(teacher={}), ["teacher", "exactly one of path and config"]),
        (changed(teacher={"config": {"hidden_size": 4}}), ["teacher", "model_type"]),
        (changed(teacher={"path": "t", "pretrain": {}}), ["teacher", "pretrain", "config"]),
        (changed(teacher={"path": "t", "peft": {}}), ["teacher.peft", "unknown key"]),
        (changed(tokenizer={"vocab_size": 512, "path": "t"}), ["tokenizer", "exactly one"]),
        (changed(tokenizer={"vocab_size": 10}), ["tokenizer.vocab_size", "300", "10"]),
        (changed(teacher={"config": {"model_type": "llama"}}), ["tokenizer", "expected a section"]),
        ("- a\n- b\n", ["expected a mapping", "list"]),
        ("output_dir: [\n", ["not valid YAML"]),
        ("output_dir: a\noutput_dir: b\n", ["'output_dir' is given twice"]),
    ],
)  # fmt: skip
def test_mistakes_are_named(write, content, fragments):
    path = write(content)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    for fragment in [str(path), *fragments]:
        assert fragment in str(caught.value)


def test_every_mistake_is_told_at_once(write):
    with pytest.raises(ConfigError) as caught:
        load_config(write(changed(loss={"temprature": 1.0, "kd_weight": -2.0})))
    assert len(str(caught.value).splitlines()) == 2


def test_missing_file(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.yaml: no such file"):
        load_config(tmp_path / "absent.yaml")


def test_overrides_are_yaml_and_make_sections(write):
    config = load_config(
        write(MINIMAL), ["training.max_steps=7", "seeds=[1, 2]", "data.name=null", "overwrite=true"]
    )
    assert config.training == {"max_steps": 7}
    assert config.seeds == [1, 2]
    assert config.data.name is None
    assert config.overwrite is True


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.max_steps", "expected dotted.path=value"),
        ("=3", "expected dotted.path=value"),
        ("output_dir.x=3", "output_dir is not a section"),
        ("loss.temprature=2.0", "did you mean 'temperature'"),
        ("seeds=[", "not valid YAML"),
    ],
)
def test_wrong_overrides(write, override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(write(MINIMAL), [override])


HIDDEN = {"layers": {1: 3, -1: -1}, "weight": {1: 0.5, -1: 1.0}, "norm": "rms"}


def test_layer_numbers_survive_a_dump(write):
    config = load_config(write(changed(loss={"hidden_states": HIDDEN})))
    assert config.loss.hidden_states.layers == {1: 3, -1: -1}
    again = load_config(write(dump_config(config), "again.yaml"))
    assert again == config
    assert again.loss.hidden_states.weight == {1: 0.5, -1: 1.0}


def test_an_override_leaves_what_an_anchor_shares(write):
    path = write(
        "output_dir: o\ndata: {source: s}\ntokenizer: {vocab_size: 300}\n"
        "teacher: {config: &tiny {model_type: llama}}\nstudent: {config: *tiny}\n"
    )
    config = load_config(path, ["student.config.num_hidden_layers=2"])
    assert config.student.config == {"model_type": "llama", "num_hidden_layers": 2}
    assert config.teacher.config == {"model_type": "llama"}


def test_layers_can_be_set_by_their_dotted_path(write):
    path = write(changed(loss={"hidden_states": {"layers": {1: 3}}}))
    config = load_config(path, ["loss.hidden_states.layers.2=6", "loss.hidden_states.weight=2"])
    assert config.loss.hidden_states.layers == {1: 3, 2: 6}
    assert config.loss.hidden_states.weight == 2.0


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"loss": {"hidden_states": {}}}, "loss.hidden_states.layers: missing"),
        ({"loss": {"hidden_states": {"layers": {}}}}, "loss.hidden_states.layers"),
        ({"loss": {"hidden_states": {"layers": {"a": 1}}}}, "loss.hidden_states.layers"),
        (
            {"loss": {"hidden_states": {"layer": {1: 1}}}},
            "loss.hidden_states.layer: unknown key; did you mean 'layers'?",
        ),
        (
            {"loss": {"hidden_states": {**HIDDEN, "projection": "low_rank"}}},
            "loss.hidden_states: rank: expected together with projection: low_rank",
        ),
        (
            {"loss": {"relations": {"layers": {1: 1}}}},
            "loss.relations: expected data.packing: false",
        ),
        ({"student": {"path": "s", "fused_lora": True}}, "fused_lora: expected a peft section"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value[:40],
)
def test_mistakes_in_losses_inside_the_networks(write, sections, message):
    with pytest.raises(ConfigError) as caught:
        load_config(write(changed(**sections)))
    assert message in str(caught.value)

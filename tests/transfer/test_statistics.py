"""Statistics are those of the features themselves, and tell where they come from."""

import json

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from modxfer_fast.files import damaged_files
from modxfer_fast.transfer import (
    PairedBatch,
    Pairing,
    Statistics,
    TransferError,
    collect_statistics,
    linear_cka,
    model_fingerprint,
    module_fingerprint,
    read_artefact,
    write_artefact,
)
from modxfer_fast.transfer.features import FeatureTaps, Site, observed
from tests.transfer_inputs import TEXTS, byte_level, sentencepiece_like, tiny_model, wordpiece

PAIRS = [(0, 0), (1, 2)]
SPACES = ["attention_in", "query", "ffn_out"]
TEACHER_TOKENIZER, STUDENT_TOKENIZER = wordpiece(), byte_level()


def make_models():
    teacher = tiny_model("bert", num_layers=4, hidden_size=24, seed=1)
    return teacher, tiny_model("distilbert", num_layers=2, hidden_size=16, seed=2)


def make_batches(**options):
    options = {"batch_size": 1, **options}
    return Pairing(**options).batches(TEXTS, TEACHER_TOKENIZER, STUDENT_TOKENIZER)


def collect(teacher, student, batches, **options):
    options = {"layer_pairs": PAIRS, "spaces": SPACES, "held_out_every": 2, **options}
    return collect_statistics(teacher, student, batches, **options)


def features(model, batches, role, space, layer):
    """Rows of every batch, by another path than the accumulators."""
    rows = []
    with observed(model):
        for batch in batches:
            taps = FeatureTaps(model, [Site(space, layer)], role)
            pool = getattr(batch, f"{role}_pool")
            rows += taps.run(getattr(batch, f"{role}_inputs"), pool)
    return [block.double().numpy() for block in rows]


@pytest.mark.parametrize("kind", ["words", "spans"])
def test_moments_are_those_of_the_concatenated_features(kind):
    teacher, student = make_models()
    batches = make_batches(kind=kind)
    statistics = collect(teacher, student, batches)
    for space in SPACES:
        for s, t in PAIRS:
            xs = features(student, batches, "student", space, s)
            ys = features(teacher, batches, "teacher", space, t)
            for held_out in (False, True):
                chosen = [i for i in range(len(batches)) if (i % 2 == 1) == held_out]
                x = np.concatenate([xs[i] for i in chosen])
                y = np.concatenate([ys[i] for i in chosen])
                moments = statistics.moments(space, s, t, held_out=held_out)
                assert moments.count == len(x)
                whole = np.cov(x, y, rowvar=False, bias=True)
                d = x.shape[1]
                for found, expected in (
                    (moments.mean_x, x.mean(0)),
                    (moments.mean_y, y.mean(0)),
                    (moments.var_x, x.var(0)),
                    (moments.var_y, y.var(0)),
                    (moments.cov_xx, whole[:d, :d]),
                    (moments.cov_yy, whole[d:, d:]),
                    (moments.cov_xy, whole[:d, d:]),
                    (moments.correlation(), np.corrcoef(x, y, rowvar=False)[:d, d:]),
                ):
                    scale = np.abs(expected).max()
                    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-5 * scale)


def test_the_held_out_tokens_are_the_others():
    teacher, student = make_models()
    batches = make_batches()
    rows = [batch.counts.rows for batch in batches]
    facts = collect(teacher, student, batches).facts
    assert (facts["tokens"], facts["held_out_tokens"]) == (sum(rows[::2]), sum(rows[1::2]))
    none = collect(teacher, student, batches, held_out_every=0)
    assert (none.facts["tokens"], none.facts["held_out_tokens"]) == (sum(rows), 0)
    with pytest.raises(TransferError, match=r"no token is held out \(5 batches, held_out_every 0"):
        none.moments("query", 0, 0, held_out=True)


def test_facts():
    teacher, student = make_models()
    batches = make_batches(batch_size=2)
    seen = []
    facts = collect(
        teacher, student, batches, progress=lambda done, total: seen.append((done, total))
    ).facts
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert facts["examples"] == 5
    assert facts["batches"] == 3
    assert facts["tokens"] + facts["held_out_tokens"] == len(" ".join(TEXTS).split())
    assert facts["kept_fraction"] == 1.0
    assert facts["kept_tokens"] == sum(len(STUDENT_TOKENIZER.tokenize(text)) for text in TEXTS)
    assert facts["pairing"] == "words"
    assert facts["teacher_tokenizer"] == batches.facts["teacher_tokenizer"]
    assert facts["spaces"] == SPACES
    assert facts["layer_pairs"] == [[0, 0], [1, 2]]
    assert facts["teacher"]["family"] == "bert"
    assert facts["teacher"]["num_layers"] == 4
    assert facts["student"]["fingerprint"] == model_fingerprint(student)
    assert facts["teacher"]["module"] is None
    assert set(facts["versions"]) == {"modxfer_fast", "torch", "transformers", "peft"}
    assert facts["widths"]["query"] == {
        "student": 16,
        "teacher": 24,
        "too_few_tokens": False,
        "constant_student": 0,
        "constant_teacher": 0,
    }
    assert json.loads(json.dumps(facts)) == facts


def test_fewer_tokens_than_features_are_allowed_and_recorded():
    teacher, student = make_models()
    batches = Pairing().batches(["a quick fox"], TEACHER_TOKENIZER, STUDENT_TOKENIZER)
    statistics = collect(teacher, student, batches)
    assert statistics.facts["tokens"] == 3
    assert statistics.facts["widths"]["query"]["too_few_tokens"] is True
    assert statistics.moments("query", 0, 0).cov_xx.isfinite().all()


def test_features_without_variance_are_counted():
    teacher, student = make_models()
    query = teacher.bert.encoder.layer[2].attention.self.query
    with torch.no_grad():
        query.weight[[3, 5]] = 0.0
    widths = collect(teacher, student, make_batches()).facts["widths"]
    assert (widths["query"]["constant_teacher"], widths["query"]["constant_student"]) == (2, 0)
    assert widths["ffn_out"]["constant_teacher"] == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_named(bad):
    teacher, student = make_models()
    with torch.no_grad():
        student.distilbert.transformer.layer[1].ffn.lin2.bias[0] = bad
    expected = r"student: expected finite features, got NaN or infinity in ffn_out of layer 1"
    with pytest.raises(TransferError, match=expected):
        collect(teacher, student, make_batches())
    teacher, student = make_models()
    with torch.no_grad():
        teacher.bert.encoder.layer[0].attention.self.query.bias[0] = bad
    with pytest.raises(TransferError, match=r"teacher: .* in query of layer 0"):
        collect(teacher, student, make_batches())


def test_a_model_compared_with_itself():
    model = tiny_model("bert", seed=3)
    batches = Pairing("spans", batch_size=2).batches(TEXTS, TEACHER_TOKENIZER, TEACHER_TOKENIZER)
    statistics = collect(model, model, batches, layer_pairs="all", spaces=["layer_out"])
    moments = statistics.moments("layer_out", 1, 1)
    assert torch.equal(moments.mean_x, moments.mean_y)
    torch.testing.assert_close(moments.cov_xy, moments.cov_xx, rtol=1e-6, atol=1e-7)
    ones = torch.ones(16, dtype=torch.float64)
    torch.testing.assert_close(moments.correlation().diagonal(), ones, rtol=0, atol=1e-6)


def test_linear_cka():
    teacher, student = make_models()
    batches = make_batches()
    statistics = collect(teacher, student, batches, layer_pairs="all", spaces=["layer_out"])
    table = statistics.cka()
    assert table.shape == (2, 4)
    x = np.concatenate(features(student, batches, "student", "layer_out", 1)[::2])
    y = np.concatenate(features(teacher, batches, "teacher", "layer_out", 2)[::2])
    x, y = x - x.mean(0), y - y.mean(0)
    gram = lambda z: z @ z.T  # by its other definition, on examples
    expected = (gram(x) * gram(y)).sum() / np.linalg.norm(gram(x)) / np.linalg.norm(gram(y))
    assert float(table[1, 2]) == pytest.approx(expected, rel=1e-5)

    partly = collect(teacher, student, batches, layer_pairs=[(0, 3)], spaces=["layer_out"]).cka()
    assert partly.isfinite().nonzero().tolist() == [[0, 3]]
    itself = collect(student, student, _same_batches(), layer_pairs=[(0, 0)], spaces=["query"])
    assert linear_cka(itself.moments("query", 0, 0)) == pytest.approx(1.0, rel=1e-6)


def test_linear_cka_of_a_side_without_variance_is_zero():
    teacher, student = make_models()
    with torch.no_grad():
        student.distilbert.transformer.layer[0].attention.q_lin.weight.zero_()
    assert linear_cka(collect(teacher, student, make_batches()).moments("query", 0, 0)) == 0.0


def _same_batches(num_batches=3):
    generator = torch.Generator().manual_seed(0)
    return [
        PairedBatch.of_ids(torch.randint(5, 300, (2, 9), generator=generator))
        for _ in range(num_batches)
    ]


def test_batches_of_ids_need_no_tokenizer():
    facts = collect(*make_models(), _same_batches()).facts
    assert (facts["tokens"], facts["held_out_tokens"]) == (36, 18)
    assert "pairing" not in facts


def test_the_module_counts_only_when_asked_for():
    teacher, student = make_models()
    batches = make_batches()
    bare = collect(teacher, student, batches)
    torch.manual_seed(5)
    with_module = get_peft_model(teacher, LoraConfig(target_modules=["query"]))
    for name, parameter in with_module.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    switched_off = collect(with_module, student, batches)
    active = collect(with_module, student, batches, module_active=True)
    mean = lambda statistics: statistics.moments("query", 1, 2).mean_y
    assert torch.equal(mean(switched_off), mean(bare))
    assert not torch.allclose(mean(active), mean(bare), atol=1e-3)
    assert torch.equal(active.moments("query", 1, 2).mean_x, bare.moments("query", 1, 2).mean_x)
    assert switched_off.facts["teacher"] == bare.facts["teacher"]
    assert active.facts["teacher"]["module"] == module_fingerprint(with_module)
    with pytest.raises(TransferError, match=r"module_active: expected a teacher with a PEFT"):
        collect(student, student, batches, module_active=True)
    with pytest.raises(TransferError, match=r"module_active: expected two models"):
        collect(with_module, teacher, batches, module_active=True)


def test_a_merged_module_is_left_merged():
    teacher, student = make_models()
    merged = get_peft_model(teacher, LoraConfig(target_modules=["query"]))
    merged.merge_adapter()
    for active in (False, True):
        with pytest.raises(TransferError, match=r"merged into them; call unmerge_adapter\(\)"):
            collect(merged, student, make_batches(), module_active=active)
    assert merged.get_layer_status()[0].merged_adapters == ["default"]


def test_runs_are_bit_equal_and_leave_the_models_as_they_were():
    teacher, student = make_models()
    teacher.train()
    first, second = (collect(teacher, student, make_batches()) for _ in range(2))
    for space in SPACES:
        one, other = (run.moments(space, 1, 2) for run in (first, second))
        assert torch.equal(one.cov_xy, other.cov_xy)
        assert torch.equal(one.cov_yy, other.cov_yy)
    assert first.facts == second.facts
    assert teacher.training


# --- fingerprints


def test_the_fingerprint_changes_with_a_weight():
    one, other = tiny_model("bert"), tiny_model("bert")
    assert model_fingerprint(one) == model_fingerprint(other)
    with torch.no_grad():
        other.bert.encoder.layer[1].output.dense.weight[0, 0] += 1e-6
    assert model_fingerprint(one) != model_fingerprint(other)
    assert model_fingerprint(one) != model_fingerprint(tiny_model("bert").half())


def test_the_fingerprint_is_that_of_the_model_under_any_head_and_module():
    model = tiny_model("bert")
    expected = model_fingerprint(model)
    assert model_fingerprint(model.bert) == expected
    torch.nn.init.zeros_(model.classifier.weight)
    assert model_fingerprint(model) == expected
    assert module_fingerprint(model) is None
    config = LoraConfig(target_modules=["query", "value"], task_type="TOKEN_CLS")
    with_module = get_peft_model(model, config)
    assert model_fingerprint(with_module) == expected
    module = module_fingerprint(with_module)
    torch.nn.init.ones_(
        with_module.get_submodule("base_model.model.bert.encoder.layer.0.attention.self.query")
        .lora_B["default"]
        .weight
    )
    assert module_fingerprint(with_module) != module
    assert model_fingerprint(with_module) == expected


def test_the_fingerprint_of_a_module_is_that_of_the_active_one():
    config = LoraConfig(target_modules=["query"])
    model = get_peft_model(tiny_model("bert"), config, adapter_name="ner")
    alone = module_fingerprint(model)
    torch.manual_seed(7)
    model.add_adapter("other", config)
    assert module_fingerprint(model) == alone
    model.set_adapter("other")
    assert module_fingerprint(model) not in (alone, None)
    model.base_model.set_adapter(["ner", "other"])
    both = module_fingerprint(model)
    assert both not in (alone, None)
    model.base_model.set_adapter(["other", "ner"])
    assert module_fingerprint(model) == both


# --- artefacts


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work") / "statistics"
    statistics = collect(*make_models(), make_batches())
    statistics.save(folder)
    return folder, statistics


def test_saved_and_loaded(saved):
    folder, statistics = saved
    loaded = Statistics.load(folder)
    assert loaded.facts == statistics.facts
    assert loaded.layer_pairs == ((0, 0), (1, 2))
    for held_out in (False, True):
        one, other = (
            each.moments("ffn_out", 1, 2, held_out=held_out) for each in (statistics, loaded)
        )
        for name in ("count", "mean_x", "mean_y", "var_x", "var_y", "cov_xx", "cov_yy", "cov_xy"):
            mine, theirs = getattr(one, name), getattr(other, name)
            assert mine == theirs if name == "count" else torch.equal(mine, theirs), name


def test_an_artefact_is_sealed(saved):
    folder, _ = saved
    assert damaged_files(folder) == []
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["complete.json", "facts.json", "tensors.safetensors"]


@pytest.mark.parametrize("name", ["tensors.safetensors", "facts.json"])
def test_a_corrupt_file_is_named(tmp_path, name):
    folder = tmp_path / "artefact"
    write_artefact(folder, "maps", {"a": torch.ones(64)}, {"tokens": 5})
    assert read_artefact(folder, "maps")[1] == {"tokens": 5}
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(
        TransferError, match=rf"{name}: expected the file .* checksum .* maps again"
    ):
        read_artefact(folder, "maps")


@pytest.mark.parametrize("name", ["tensors.safetensors", "facts.json", "complete.json"])
def test_a_missing_file_is_named(tmp_path, name):
    folder = tmp_path / "artefact"
    write_artefact(folder, "maps", {"a": torch.ones(4)}, {})
    (folder / name).unlink()
    with pytest.raises(TransferError, match=rf"{name}: no such file; expected it in maps"):
        read_artefact(folder, "maps")


def test_other_folders(tmp_path):
    with pytest.raises(TransferError, match=r"nowhere: no such folder; expected statistics"):
        Statistics.load(tmp_path / "nowhere")
    write_artefact(tmp_path / "maps", "maps", {"a": torch.ones(4)}, {})
    with pytest.raises(TransferError, match=r"maps: expected statistics, got maps"):
        Statistics.load(tmp_path / "maps")
    (tmp_path / "maps" / "complete.json").write_text("nonsense")
    with pytest.raises(TransferError, match=r"complete.json: expected the file as it was written"):
        read_artefact(tmp_path / "maps", "maps")
    (tmp_path / "maps" / "facts.json").write_text("nonsense")
    with pytest.raises(TransferError, match=r"maps: cannot be read as maps"):
        read_artefact(tmp_path / "maps", "maps", checksums=False)


def test_a_full_disk_leaves_the_older_artefact(tmp_path):
    resource = pytest.importorskip("resource")
    folder = tmp_path / "artefact"
    write_artefact(folder, "maps", {"a": torch.ones(4)}, {"tokens": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))  # every larger write is refused
    try:
        with pytest.raises(TransferError, match=r"artefact: cannot be written \(.*arge"):
            write_artefact(folder, "maps", {"a": torch.ones(1 << 16)}, {"tokens": 2})
        with pytest.raises(TransferError, match=r"new: cannot be written"):
            write_artefact(tmp_path / "new", "maps", {"a": torch.ones(1 << 16)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["artefact"]
    assert read_artefact(folder, "maps")[1] == {"tokens": 1}


def test_a_folder_with_other_files_is_no_place_for_an_artefact(tmp_path):
    folder = tmp_path / "notes"
    folder.mkdir()
    write_artefact(folder, "maps", {"a": torch.ones(4)}, {})  # an empty one is
    write_artefact(folder, "maps", {"a": torch.zeros(4)}, {})
    with pytest.raises(TransferError, match=r"notes: expected a place for statistics, got .* maps"):
        write_artefact(folder, "statistics", {}, {})
    (folder / "optimizer.pt").touch()
    with pytest.raises(TransferError, match=r"artefact that is replaced, got optimizer\.pt; name"):
        write_artefact(folder, "maps", {"a": torch.ones(4)}, {})
    (folder / "facts.json").unlink()  # sealed, as a checkpoint is
    with pytest.raises(TransferError, match=r"notes: exists and is no artefact; name another"):
        write_artefact(folder, "maps", {"a": torch.ones(4)}, {})
    assert (folder / "tensors.safetensors").is_file()


# --- bad input


def test_places_that_were_not_collected(saved):
    _, statistics = saved
    with pytest.raises(TransferError, match=r"attention_in, query, ffn_out .* 0-0, 1-2; got key"):
        statistics.moments("key", 0, 0)
    with pytest.raises(TransferError, match=r"got query 0-2"):
        statistics.moments("query", 0, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"spaces": ["hidden"]}, r"spaces: the teacher \(bert\) has attention_in, .*'hidden'"),
        ({"spaces": []}, r"spaces: expected at least one"),
        ({"layer_pairs": [(0, 4)]}, r"layer_pairs: the teacher has layers 0 to 3, got 4"),
        ({"layer_pairs": [(2, 0)]}, r"layer_pairs: the student has layers 0 to 1, got 2"),
        ({"layer_pairs": []}, r"layer_pairs: expected at least one"),
        ({"layer_pairs": "some"}, r'layer_pairs: expected pairs or "all", got .some'),
        ({"held_out_every": 1}, r"held_out_every: expected 0 or at least 2, got 1"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(TransferError, match=message):
        collect(*make_models(), make_batches(), **options)


def test_nothing_in_common():
    batches = Pairing("positions").batches(["q"], TEACHER_TOKENIZER, sentencepiece_like())
    assert batches[0].counts.rows == 0
    with pytest.raises(TransferError, match=r"batches: expected rows that both models share"):
        collect(*make_models(), batches)

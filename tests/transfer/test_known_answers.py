"""A module moved to a model that is the same function in other coordinates does the same there."""

from dataclasses import replace

import pytest
import torch
from peft import IA3Config, LoraConfig
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from transformers import PreTrainedTokenizerFast

from modxfer_fast.models import (
    Architecture,
    BottleneckConfig,
    CompacterConfig,
    phm_dense,
    phm_refit,
)
from modxfer_fast.transfer import (
    MapOptions,
    Pairing,
    PeftModuleState,
    attach,
    collect_statistics,
    fit_maps,
    make_layer_map,
    transport,
)
from tests.transfer_clones import (
    bases,
    clone,
    logits,
    original,
    permutation,
    rotation,
    signed_permutation,
    statistics,
    trained,
    with_plain_norms,
)

LINEARS = {
    "bert": ["query", "key", "value", "attention.output.dense", "intermediate.dense"],
    "roberta": r".*\.(query|value|output\.dense)",
    "distilbert": ["q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
ROUNDING = {"roberta": 1e-9, "distilbert": 1e-9, "llama": 1e-5}  # an RMS norm computes in fp32
TASK = {"bert": "TOKEN_CLS", "roberta": "TOKEN_CLS", "distilbert": "TOKEN_CLS", "llama": None}


def lora(family, **options):
    options = {"r": 3, "lora_alpha": 5, "target_modules": LINEARS[family], **options}
    return LoraConfig(task_type=TASK[family], **options)


def move(teacher, student, config, method="lsa", *, kind="uniform", options=None, **more):
    """The teacher with a module, and the student with the module moved there; heads alike."""
    with_module = trained(teacher, config)
    module = PeftModuleState.from_model(with_module)
    layers = Architecture.of(student).num_layers, Architecture.of(teacher).num_layers
    layer_map = make_layer_map(kind, *layers)
    sites = (options or MapOptions()).sites(module.spaces)
    facts = statistics(teacher, student, sites, layer_map)
    maps = fit_maps(
        facts,
        layer_map,
        method,
        teacher=Architecture.of(teacher),
        student=Architecture.of(student),
        module=module,
        options=options,
    )
    moved = transport(module, maps, layer_map, student, statistics=facts, **more)
    return with_module, module, maps, moved


def change(model):
    """What the module changes in the logits; the head counts on neither side."""
    with model.disable_adapter():
        without = logits(model)
    return logits(model) - without


def with_head_of(moved, with_module, q):
    """The teacher's trained head in the clone's coordinates, beside the moved module."""
    head = PeftModuleState.from_model(with_module).head
    return replace(
        moved,
        head={
            name: tensor @ q[0, "layer_out"] if tensor.dim() == 2 else tensor
            for name, tensor in head.items()
        },
    )


CONFIGS = {
    "lora": lora("bert"),
    "rslora": lora("bert", use_rslora=True, rank_pattern={"value": 2}),
    "lora_attention": lora("bert", target_modules=["query", "value", "attention.output.dense"]),
    "pfeiffer": BottleneckConfig(bottleneck_size=6, task_type="TOKEN_CLS"),
    "houlsby": BottleneckConfig(bottleneck_size=6, placement="houlsby", task_type="TOKEN_CLS"),
    "parallel": BottleneckConfig(bottleneck_size=6, placement="parallel", task_type="TOKEN_CLS"),
    "ia3": IA3Config(
        target_modules=["key", "value", "output.dense"],
        feedforward_modules=[],
        task_type="TOKEN_CLS",
    ),
    "ia3_inputs": IA3Config(
        target_modules=["key", "intermediate.dense"],
        feedforward_modules=["intermediate.dense"],
        task_type="TOKEN_CLS",
    ),
}


@pytest.mark.parametrize(
    ("name", "method"),
    [(name, method) for name in CONFIGS for method in ("lsa", "lsa_abs")]
    + [("lora", method) for method in ("identity", "truncate", "stride")],
)
def test_the_same_model_gives_identity_maps_and_equal_bits(name, method):
    teacher = original("bert")
    with_module, module, maps, moved = move(teacher, teacher, CONFIGS[name], method)
    for entry in maps.values():
        identity = torch.eye(entry.read.shape[0], dtype=torch.float64)
        assert torch.equal(entry.read, identity)
        assert torch.equal(entry.write, identity)
    for slot, tensors in module.slots.items():
        for part, tensor in tensors.items():
            assert torch.equal(moved.slots[slot][part], tensor), (slot, part)
    student = attach(replace(moved, head=module.head), original("bert"))
    assert torch.equal(logits(student), logits(with_module))


@pytest.mark.parametrize("method", ["lsa", "lsa_abs"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_permuted_clone_is_recovered_by_assignment(name, method):
    teacher = original("bert")
    q = bases(teacher)
    student = clone(teacher, q)
    assert torch.allclose(logits(teacher), logits(student), atol=1e-11)
    with_module, _, maps, moved = move(teacher, student, CONFIGS[name], method)
    for (space, s, t), entry in maps.items():
        assert s == t
        assert torch.equal(entry.read != 0, q[s, space].T != 0), space
        assert torch.allclose(entry.read, q[s, space].T, atol=1e-9)
        assert torch.allclose(entry.write, q[s, space], atol=1e-9)
    moved = with_head_of(moved, with_module, q)
    result, expected = logits(attach(moved, student)), logits(with_module)
    assert (result - expected).abs().max() < 1e-9 * expected.abs().max()


@pytest.mark.parametrize("method", ["procrustes", "ridge", "reduced_rank"])
@pytest.mark.parametrize("name", ["lora_attention", "pfeiffer", "houlsby", "parallel", "ia3"])
def test_a_permuted_clone_is_recovered_by_dense_maps(name, method):
    """Where features span their space: those behind a norm do only about 0 or head by head."""
    teacher = original("bert")
    q = bases(teacher)
    student = clone(teacher, q)
    options = MapOptions(ridge=(1e-10,), head_aware=True)
    with_module, _, _, moved = move(teacher, student, CONFIGS[name], method, options=options)
    moved = with_head_of(moved, with_module, q)
    result, expected = logits(attach(moved, student)), logits(with_module)
    assert (result - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("family", ["roberta", "distilbert", "llama"])
def test_a_permuted_clone_of_every_family_is_recovered(family):
    teacher = original(family)
    q = bases(teacher, seed=1)
    student = clone(teacher, q)
    with_module, _, maps, moved = move(teacher, student, lora(family))
    for (space, s, _), entry in maps.items():
        assert torch.equal(entry.read, q[s, space].T), space
    if TASK[family]:
        moved = with_head_of(moved, with_module, q)
    result, expected = change(attach(moved, student)), change(with_module)
    assert (result - expected).abs().max() < ROUNDING[family] * expected.abs().max()


def test_one_global_map_recovers_a_permuted_clone():
    teacher = original("bert", num_layers=3)
    q = bases(teacher)
    student = clone(teacher, q)
    options = MapOptions(scope="global", ridge=(1e-10,))
    methods = {"lsa": 1e-9, "lsa_abs": 1e-9, "procrustes": 1e-5, "ridge": 1e-5}
    for method, tolerance in methods.items():
        config = CONFIGS["houlsby"]
        with_module, _, maps, moved = move(teacher, student, config, method, options=options)
        first = next(iter(maps.values())).read
        assert all(torch.equal(entry.read != 0, first != 0) for entry in maps.values())
        moved = with_head_of(moved, with_module, q)
        expected = logits(with_module)
        difference = (logits(attach(moved, clone(teacher, q))) - expected).abs().max()
        assert difference < tolerance * expected.abs().max()


@pytest.mark.parametrize("write", ["rotation", "regression"])
def test_one_global_map_without_means_recovers_a_clone_in_another_basis(write):
    teacher = with_plain_norms(original("llama"))
    q = bases(teacher, rotation)
    student = clone(teacher, q)
    options = MapOptions(scope="global", ridge=(1e-9,), write=write)
    config = lora("llama", target_modules=["o_proj", "down_proj"])
    with_module, _, maps, moved = move(teacher, student, config, "ridge", options=options)
    assert all("ridge_read" in entry.fit for entry in maps.values())
    expected = change(with_module)
    result = change(attach(moved, clone(teacher, q)))
    assert (result - expected).abs().max() < 1e-3 * expected.abs().max()


def test_turned_signs_are_carried_by_lsa_abs_alone():
    teacher = original("llama")
    q = bases(teacher, signed_permutation)
    student = clone(teacher, q)
    assert torch.allclose(logits(teacher), logits(student), atol=1e-4)
    config = lora("llama", target_modules=["v_proj", "o_proj", "down_proj"])
    with_module, _, maps, moved = move(teacher, student, config, "lsa_abs")
    for (space, s, _), entry in maps.items():
        assert torch.allclose(entry.read, q[s, space].T, atol=1e-5), space
    expected = change(with_module)
    result = change(attach(moved, clone(teacher, q)))
    assert (result - expected).abs().max() < ROUNDING["llama"] * expected.abs().max()
    _, _, _, unsigned = move(teacher, student, config, "lsa")
    wrong = change(attach(unsigned, student))
    assert (wrong - expected).abs().max() > 0.1 * expected.abs().max()


@pytest.mark.parametrize("method", ["procrustes", "ridge"])
def test_a_rotated_clone_is_recovered(method):
    teacher = with_plain_norms(original("llama"))
    q = bases(teacher, rotation)
    student = clone(teacher, q)
    assert torch.allclose(logits(teacher), logits(student), atol=1e-4)
    config = lora("llama", target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"])
    options = MapOptions(ridge=(1e-9,))
    with_module, _, maps, moved = move(teacher, student, config, method, options=options)
    for (space, s, _), entry in maps.items():
        assert torch.allclose(entry.read, q[s, space].T, atol=1e-4), space
        assert torch.allclose(entry.write, q[s, space], atol=1e-4), space
    expected = change(with_module)
    result = change(attach(moved, clone(teacher, q)))
    assert (result - expected).abs().max() < 1e-4 * expected.abs().max()
    _, _, _, permuted = move(teacher, student, config, "lsa")
    wrong = change(attach(permuted, student))
    assert (wrong - expected).abs().max() > 0.1 * expected.abs().max()


def widened(model: nn.Module, width: int) -> nn.Module:
    """The same Llama with residual features that are always 0 behind its own."""
    parts = Architecture.of(model)
    wide = original(
        "llama",
        hidden_size=width,
        head_dim=parts.head_dim,
        num_layers=parts.num_layers,
        rms_norm_eps=0.0,
    )
    own = parts.hidden_size
    with torch.no_grad():
        source = dict(model.named_parameters())
        for name, parameter in wide.named_parameters():
            value = source[name]
            parameter.zero_()
            parameter[tuple(slice(n) for n in value.shape)] = value
            if "norm" in name:  # the mean square is over more features
                parameter *= (own / width) ** 0.5
        return wide


@pytest.mark.parametrize("method", ["lsa", "lsa_abs", "procrustes", "ridge", "truncate"])
@pytest.mark.parametrize("wider", ["teacher", "student"])
def test_a_widened_clone_is_recovered(method, wider):
    """Features without variance on one side, and a student wider than its teacher."""
    narrow = with_plain_norms(original("llama", rms_norm_eps=0.0))
    wide = widened(narrow, 24)
    assert torch.allclose(logits(narrow), logits(wide), atol=1e-4)
    teacher, student = (wide, narrow) if wider == "teacher" else (narrow, wide)
    config = lora("llama", target_modules=["q_proj", "v_proj"])
    options = MapOptions(ridge=(1e-9,))
    with_module, _, maps, moved = move(teacher, student, config, method, options=options)
    assert all(torch.isfinite(tensor).all() for tensor in maps.state_dict().values())
    expected = change(with_module)
    result = change(attach(moved, student))
    assert (result - expected).abs().max() < 1e-4 * expected.abs().max()


def test_a_compacter_of_the_same_model_keeps_its_function():
    teacher = original("bert")
    config = CompacterConfig(bottleneck_size=8, phm_dim=4, task_type="TOKEN_CLS")
    with_module, module, _, moved = move(teacher, teacher, config)
    residuals = [number for row in moved.facts["residuals"].values() for number in row.values()]
    assert len(residuals) == 2 * len(module.slots)
    assert max(residuals) < 1e-6
    result = logits(attach(replace(moved, head=module.head), teacher))
    expected = logits(with_module)
    assert (result - expected).abs().max() < 1e-5 * expected.abs().max()


def moved_compacter(make, **options):
    """A Compacter moved to a clone: residuals, those with the teacher's rule, both logits."""
    teacher = original("bert", hidden_size=32)
    q = bases(teacher, make)
    student = clone(teacher, q)
    config = CompacterConfig(bottleneck_size=8, phm_dim=4, task_type="TOKEN_CLS", **options)
    with_module, module, _, moved = move(teacher, student, config)
    residuals, kept = [], []
    for slot, tensors in module.slots.items():
        for part in ("down", "up"):
            dense, rule = dense_compacter(tensors, part)
            residual = q[slot.layer, "layer_out"]
            dense = residual.T @ dense if part == "down" else dense @ residual
            kept.append(phm_refit(dense, rule, config.phm_rank).residual)
            lost = (dense_compacter(moved.slots[slot], part)[0] - dense).norm() / dense.norm()
            reported = moved.facts["residuals"][f"{slot.layer}.{slot.place}"]
            assert lost.item() == pytest.approx(reported[f"residual_{part}"], abs=1e-6)
            residuals.append(lost)
    outputs = logits(attach(with_head_of(moved, with_module, q), student)), logits(with_module)
    return torch.stack(residuals), torch.tensor(kept, dtype=torch.float64), outputs


def dense_compacter(tensors, part):
    rule = tensors["compacter_rule" if "compacter_rule" in tensors else f"compacter_{part}.rule"]
    factors = (tensors[f"compacter_{part}.{side}"] for side in ("left", "right"))
    return phm_dense(rule, *factors), rule


def blockwise(n, generator):
    """A permutation of 4 blocks of features, which a rule can follow."""
    return torch.kron(permutation(4, generator), torch.eye(n // 4, dtype=torch.float64))


@pytest.mark.parametrize(("rank", "left"), [(2, 1e-6), (1, 0.06)])
def test_a_compacter_is_recovered_where_another_rule_describes_the_clone(rank, left):
    """To rounding with terms of full rank; with others least squares comes near in its sweeps."""
    residuals, kept, (result, expected) = moved_compacter(
        blockwise, shared_phm_rule=False, phm_rank=rank
    )
    assert kept.min() > 0.5
    assert residuals.max() < left
    assert (result - expected).abs().max() < left * expected.abs().max()


@pytest.mark.parametrize(("shared", "left"), [(True, 0.70), (False, 0.48)])
def test_a_compacter_keeps_more_of_a_permuted_clone_with_a_new_rule(shared, left):
    """In any order it is no sum of four Kronecker products: the teacher's rule loses 0.86, one new
    rule 0.69 and one for each projection 0.47."""
    residuals, kept, _ = moved_compacter(permutation, shared_phm_rule=shared)
    assert kept.square().mean().sqrt() > 0.85
    assert residuals.square().mean().sqrt() < left


def word_level(words, first):
    """One token a word, ids from `first` on in the order of `words`."""
    vocabulary = {"[PAD]": 0, "[UNK]": 1} | {word: first + i for i, word in enumerate(words)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]"
    ), vocabulary


def test_a_clone_behind_another_tokenizer_is_recovered():
    words = [f"word{i}" for i in range(40)]
    teacher_tokenizer, teacher_ids = word_level(words, 2)
    student_tokenizer, student_ids = word_level(words[::-1], 7)
    teacher = original("bert")
    q = bases(teacher)
    student = clone(teacher, q)
    table = student.get_input_embeddings().weight
    with torch.no_grad():
        old = table.clone()
        for word in words:
            table[student_ids[word]] = old[teacher_ids[word]]
    with_module = trained(teacher, CONFIGS["lora"])
    module = PeftModuleState.from_model(with_module)
    g = torch.Generator().manual_seed(0)
    order = torch.randint(0, 40, (30, 12), generator=g).tolist()
    texts = [" ".join(words[i] for i in row) for row in order]
    pairs = Pairing(batch_size=6).batches(texts, teacher_tokenizer, student_tokenizer)
    layer_map = make_layer_map("skip", 2, 2)
    facts = collect_statistics(
        teacher,
        student,
        pairs,
        layer_pairs=layer_map.pairs,
        spaces=MapOptions().sites(module.spaces),
    )
    assert facts.facts["kept_fraction"] == 1
    parts = {"teacher": Architecture.of(teacher), "student": Architecture.of(student)}
    maps = fit_maps(facts, layer_map, "lsa", spaces=module.spaces, **parts)
    moved = with_head_of(transport(module, maps, layer_map, student), with_module, q)
    wrapped = attach(moved, student)
    with torch.no_grad():
        expected = with_module(**teacher_tokenizer(texts[:3], return_tensors="pt")).logits
        result = wrapped(**student_tokenizer(texts[:3], return_tensors="pt")).logits
    assert (result - expected).abs().max() < 1e-9 * expected.abs().max()

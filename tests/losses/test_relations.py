"""AttentionRelationLoss: kinds, heads, grouped attention; the kernel is tested in its room."""

import pytest
import torch
from transformers import BertConfig, BertModel

from modxfer_fast.engine.features.taps import LayerTaps
from modxfer_fast.kernels.relation_loss.reference import relation_loss_reference
from modxfer_fast.losses import AttentionRelationLoss
from modxfer_fast.losses.relations import common_heads, repeat_heads

B, T = 2, 6


def qkv(widths, seed):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(B, T, width, generator=generator) for width in widths)


def mask():
    return torch.arange(T) < torch.tensor([[T], [4]])


def mean_relation(student, teacher, heads, causal):
    rows = relation_loss_reference(
        student.double(),
        student.double(),
        teacher.double(),
        teacher.double(),
        heads,
        mask(),
        causal,
    )
    return rows.sum() / mask().sum()


@pytest.mark.parametrize("causal", [True, False])
def test_minilmv2_is_the_weighted_sum_of_three_relations(causal):
    student, teacher = qkv((32, 16, 16), 0), qkv((48, 48, 48), 1)
    loss_fn = AttentionRelationLoss(
        {1: 2}, num_heads=4, causal=causal, relation_weights=(1.0, 0.5, 0.0), weight=0.7
    )
    terms = loss_fn({1: student}, {2: teacher}, mask=mask())
    parts = [mean_relation(student[i], teacher[i], 4, causal) for i in range(2)]
    expected = parts[0] + 0.5 * parts[1]
    assert terms.pairs[0].item() == pytest.approx(expected.item(), rel=1e-5)
    assert terms.loss.item() == pytest.approx(0.7 * expected.item(), rel=1e-5)


def test_minilm_repeats_grouped_heads():
    student, teacher = qkv((32, 16, 16), 0), qkv((64, 64, 64), 1)
    loss_fn = AttentionRelationLoss({1: 1}, kind="minilm", num_heads=4, causal=True)
    terms = loss_fn({1: student}, {1: teacher}, mask=mask())
    query, key, value = (x.double() for x in repeat_heads(student, 4))
    assert torch.equal(key[..., :8], key[..., 8:16])
    t_query, t_key, t_value = (x.double() for x in teacher)
    rows = relation_loss_reference(query, key, t_query, t_key, 4, mask(), True)
    rows = rows + relation_loss_reference(value, value, t_value, t_value, 4, mask(), True)
    assert terms.loss.item() == pytest.approx((rows.sum() / mask().sum()).item(), rel=1e-5)


def test_relation_heads_divide_every_width():
    assert common_heads([128, 128, 128, 256, 256, 256]) == 8
    assert common_heads([128, 32, 32, 192, 64, 64]) == 2
    assert common_heads([8, 8, 8]) == 1
    loss_fn = AttentionRelationLoss({1: 1})
    terms = loss_fn({1: qkv((64, 32, 32), 0)}, {1: qkv((96, 96, 96), 1)})
    assert terms.loss > 0


def test_an_encoder_learns_from_another():
    def bert(width, layers):
        torch.manual_seed(width)
        config = BertConfig(
            vocab_size=50,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            intermediate_size=32,
        )
        return BertModel(config)

    student, teacher = bert(32, 1).train(), bert(64, 2).eval()
    taps = LayerTaps(student, "student"), LayerTaps(teacher, "teacher")
    loss_fn = AttentionRelationLoss(
        {-1: -1},
        num_student_layers=taps[0].num_layers,
        num_teacher_layers=taps[1].num_layers,
        kind="minilm",
        num_heads=4,
        causal=False,
    )
    taps[0].qkv_layers, taps[1].qkv_layers = loss_fn.student_layers, loss_fn.teacher_layers
    assert not taps[0].is_rotary(1)
    ids = torch.randint(3, 50, (B, T))
    with taps[0].recording() as of_student:
        student(ids, attention_mask=mask().long())
    with torch.no_grad(), taps[1].recording() as of_teacher:
        teacher(ids, attention_mask=mask().long())
    loss_fn(of_student.qkv, of_teacher.qkv, mask=mask()).loss.backward()
    attention = student.encoder.layer[0].attention.self
    for linear in (attention.query, attention.key, attention.value):
        assert linear.weight.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": {0: 1}}, "student layer: expected 1 or more, got 0"),
        ({"kind": "minilmv3"}, "kind: expected one of minilmv2, minilm"),
        ({"kind": "minilm"}, "num_heads: expected the attention heads of both models"),
        ({"num_heads": 0}, "num_heads: expected a positive number"),
        ({"relation_weights": (0.0, 0.0, 0.0)}, "relation_weights: expected three numbers"),
        ({"relation_weights": (1.0, 1.0)}, "relation_weights: expected three numbers"),
        ({"pair_reduction": "max"}, "pair_reduction: expected one of mean, sum"),
        ({"weight": -1.0}, "weight: expected positive numbers"),
        ({"workspace_mb": 0}, "workspace_mb: expected a positive number"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        AttentionRelationLoss(**{"layers": {1: 1}, **arguments})


def test_heads_that_do_not_fit_grouped_keys_are_named():
    with pytest.raises(ValueError, match="num_heads: expected the attention heads, got 3"):
        repeat_heads(qkv((24, 12, 12), 0), 3)

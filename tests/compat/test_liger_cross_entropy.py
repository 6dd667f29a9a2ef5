"""`compat.liger`'s cross entropy of a head beside the Liger that is installed, and beside torch.

Liger's Triton kernel runs in the interpreter here, which can do neither its soft caps nor its class
weights: those are compared with their formulas.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from modxfer_fast.compat import liger as ours
from tests.compat.test_liger import IGNORED, N, V, assert_same, heads, needs_liger, peer

__all__ = ["heads"]  # a fixture
NAME = "LigerFusedLinearCrossEntropyLoss"
REDUCTIONS = ("mean", "sum", "none")
OPTIONS = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.1, "lse_square_scale": 1e-2},
    "classes": {"ce_weight": torch.linspace(0.5, 2.0, V)},
    "classes, smoothed": {
        "ce_weight": torch.linspace(0.5, 2.0, V),
        "label_smoothing": 0.1,
        "lse_square_scale": 1e-2,
    },
    "scaled tokens": {"use_token_scaling": True, "lse_square_scale": 1e-2},
}
RETURNS = ("return_z_loss", "return_token_accuracy", "return_predicted_tokens")


def outputs(result) -> tuple:
    """What is there of a loss or a CrossEntropyOutput."""
    if isinstance(result, Tensor):
        return (result,)
    found = (result.loss, result.z_loss, result.token_accuracy, result.predicted_tokens)
    return tuple(each for each in found if each is not None)


@needs_liger
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", ["plain", "smoothed", "scaled tokens"])
def test_is_ligers(name, reduction, heads):
    (hidden, weight, bias), _, labels = heads
    labels[4] = F.linear(hidden, weight, bias)[4].argmax()
    options = {"ignore_index": IGNORED, "reduction": reduction, **OPTIONS[name]}
    for returned in ((), RETURNS):
        told = dict.fromkeys(returned, True)
        expected, got = (
            outputs(kind(**options, **told)(weight, hidden, labels, bias))
            for kind in (peer(NAME), getattr(ours, NAME))
        )
        assert [x.dtype for x in got] == [x.dtype for x in expected]
        assert_same(expected, got, (hidden, weight, bias))
    assert 0 < got[2].sum() < N


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_is_its_formula(softcap, name, reduction, heads):
    (hidden, weight, bias), _, labels = heads
    options = {"reduction": reduction, "softcap": softcap, **OPTIONS[name]}
    kind = getattr(ours, NAME)(ignore_index=IGNORED, **options, **dict.fromkeys(RETURNS, True))
    got = kind(weight, hidden, labels, bias)
    wide = [t.detach().double().requires_grad_() for t in (hidden, weight, bias)]
    z = F.linear(*wide)
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    counts, classes = labels != IGNORED, options.get("ce_weight", torch.ones(V)).double()
    rows = F.cross_entropy(
        *(z, labels, classes),
        ignore_index=IGNORED,
        reduction="none",
        label_smoothing=options.get("label_smoothing", 0.0),
    )
    of_z = options.get("lse_square_scale", 0.0) * z.logsumexp(-1).square() * counts
    p = z.detach().softmax(-1).gather(1, labels[:, None])[:, 0]
    scaling = p if options.get("use_token_scaling") else torch.ones(N)
    is_mean, is_top = reduction == "mean", (z.argmax(-1) == labels) * counts
    rows = rows / (classes[labels[counts]].sum() if is_mean else 1.0) * scaling
    of_z = of_z / (counts.sum() if is_mean else 1.0) * scaling
    loss, accuracy = rows + of_z, is_top.float()
    if reduction != "none":
        loss, of_z, accuracy = loss.sum(), of_z.sum(), accuracy.sum() / counts.sum()
    torch.testing.assert_close(got.loss.double(), loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.z_loss.double(), of_z.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.token_accuracy, accuracy)
    assert torch.equal(got.predicted_tokens, z.argmax(-1).masked_fill(~counts, -1))
    assert not got.z_loss.requires_grad
    upstream = torch.rand(loss.shape, generator=torch.Generator().manual_seed(3)) + 0.5
    wanted = torch.autograd.grad(loss, wide, upstream.double())
    grads = torch.autograd.grad(got.loss, (hidden, weight, bias), upstream)
    for grad, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad.double(), want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["plain", "classes, smoothed", "cosine"])
def test_ignored_tokens_may_hold_anything(name, heads):
    (hidden, weight, bias), (t_hidden, t_weight, t_bias), labels = heads

    def loss_and_gradients():
        if name == "cosine":
            kind = ours.LigerFusedLinearCosineSimilarityLoss(ignore_index=IGNORED)
            loss = kind(hidden, weight, t_hidden, t_weight, labels, bias, t_bias)
        else:
            kind = getattr(ours, NAME)(ignore_index=IGNORED, **OPTIONS[name])
            loss = kind(weight, hidden, labels, bias)
        return loss, *torch.autograd.grad(loss, (weight, bias))

    expected = loss_and_gradients()
    with torch.no_grad():
        hidden[labels == IGNORED] = torch.nan
        t_hidden[labels == IGNORED] = torch.inf
    for got, want in zip(loss_and_gradients(), expected, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_batch_without_a_label_is_0(name, heads):
    (hidden, weight, bias), _, _ = heads
    loss = getattr(ours, NAME)(**OPTIONS[name])(weight, hidden, torch.full((N,), -100), bias)
    assert loss == 0
    for grad in torch.autograd.grad(loss, (hidden, weight, bias)):
        assert not grad.any()


@pytest.mark.parametrize("name", [*OPTIONS, "cosine"])
def test_in_half_precision_rounds_once(name):
    """Gradients of bf16 heads are those of fp64, rounded."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight, t_hidden = (
        torch.randn(*size, generator=generator).bfloat16() for size in ((40, 8), (V, 8), (40, 8))
    )
    labels = torch.arange(40) % V
    grads = []
    for dtype in (torch.bfloat16, torch.float64):
        leaves = [t.to(dtype).requires_grad_() for t in (hidden, weight)]
        if name == "cosine":
            kind = ours.LigerFusedLinearCosineSimilarityLoss(chunk_size=7)
            value = kind(*leaves, t_hidden.to(dtype), weight.to(dtype) + 1.0, labels)
        else:
            value = getattr(ours, NAME)(**OPTIONS[name])(leaves[1], leaves[0], labels)
        grads.append(torch.autograd.grad(value, leaves))
    for grad, want in zip(*grads, strict=True):
        assert (grad.double() - want).norm() <= 2**-8 * want.norm()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": "total"}, "reduction: expected one of none, sum, mean, got 'total'"),
        ({"softcap": 0.0}, "softcap: expected a positive finite number or None, got 0.0"),
        ({"label_smoothing": 1.5}, "label_smoothing: expected a number in"),
        ({"lse_square_scale": -1.0}, "lse_square_scale: expected a number of at least 0"),
    ],
)
def test_a_bad_option_is_refused_when_the_loss_is_made(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        getattr(ours, NAME)(**options)


def test_bad_tensors_are_told(heads):
    (hidden, weight, _), (t_hidden, t_weight, _), labels = heads
    with pytest.raises(ValueError, match=r"ce_weight: expected floats of shape \(13,\)"):
        getattr(ours, NAME)(ce_weight=torch.ones(V + 1))(weight, hidden, labels)
    cosine = ours.LigerFusedLinearCosineSimilarityLoss()
    with pytest.raises(ValueError, match="true_labels: expected the leading dimensions"):
        cosine(hidden, weight, t_hidden, t_weight, labels[1:])
    with pytest.raises(ValueError, match="teacher_weight: expected at least the 13 classes"):
        cosine(hidden, weight, t_hidden, t_weight[1:], labels)

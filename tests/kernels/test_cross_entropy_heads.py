"""Losses without a teacher of heads of every kind, and of logits that a model scales and caps.

The truth is written out in fp64 through whole weights and logits, with autograd.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from modxfer_fast import (
    LoraWeight,
    QuantizedWeight,
    TeacherTopK,
    linear_cross_entropy,
    linear_kd_loss,
    linear_kd_loss_terms,
    linear_log_probs,
    linear_log_probs_terms,
)
from tests.inputs import BACKENDS, DTYPES, NATIVE, masked_labels
from tests.kernels.test_cross_entropy import rows_of

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    # NumPy, which interprets Triton, warns of infinities that the kernels mask
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]
N, D, V, R = 11, 12, 67, 3
# (scale, cap); logits have a standard deviation of about 2
BENDS = {"plain": (1.0, None), "scaled": (0.5, None), "capped": (1.0, 3.0), "both": (2.0, 5.0)}
HEADS = ("plain", "bias", "lora", "quantized", "lora on quantized")


def randn(*size: int, seed: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def bent(raw: Tensor, scale: float, cap: float | None) -> Tensor:
    return scale * raw if cap is None else cap * torch.tanh(scale * raw / cap)


class Head:
    """A head of one kind: what a call takes, what is trained, and its logits in fp64."""

    def __init__(self, kind: str, dtype: torch.dtype):
        self.leaves = {"hidden": randn(N, D, seed=1).to(dtype)}
        weight = 0.6 * randn(V, D, seed=2)
        if "quantized" in kind:
            scale = weight.abs().amax(1) / 127
            stored = (weight / scale[:, None]).round().to(torch.int8)
            self.weight = QuantizedWeight(stored, lambda rows, s: rows * s[:, None], scale)
            self.base = (stored * scale[:, None]).to(dtype).double()  # as the hidden states are
        else:
            self.weight = self.leaves["weight"] = weight.to(dtype)
        if "lora" in kind:
            self.leaves["lora_A"] = (0.5 * randn(R, D, seed=3)).to(dtype)
            self.leaves["lora_B"] = (0.5 * randn(V, R, seed=4)).to(dtype)
            self.weight = LoraWeight(self.weight, self.leaves["lora_A"], self.leaves["lora_B"], 0.7)
        if kind != "plain":
            self.leaves["bias"] = (0.3 * randn(V, seed=5)).to(dtype)
        for leaf in self.leaves.values():
            leaf.requires_grad_()

    def arguments(self) -> dict:
        return {
            "hidden": self.leaves["hidden"],
            "weight": self.weight,
            "bias": self.leaves.get("bias"),
        }

    def logits(self, leaves: dict[str, Tensor]) -> Tensor:
        weight = leaves.get("weight", getattr(self, "base", None))
        if "lora_A" in leaves:
            weight = weight + 0.7 * leaves["lora_B"] @ leaves["lora_A"]
        return F.linear(leaves["hidden"], weight, leaves.get("bias"))


def assert_as_in_fp64(head: Head, loss: Tensor, of_logits, upstream: Tensor) -> None:
    """Loss and gradients within the rounding of fp32 sums and one rounding of a gradient."""
    wide = {name: t.detach().double().requires_grad_() for name, t in head.leaves.items()}
    truth = of_logits(head.logits(wide))
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-5)
    wanted = torch.autograd.grad(truth, list(wide.values()), upstream.double())
    grads = torch.autograd.grad(loss, list(head.leaves.values()), upstream)
    for (name, leaf), grad, want in zip(head.leaves.items(), grads, wanted, strict=True):
        assert grad.dtype == leaf.dtype
        tolerance = 1e-5 + torch.finfo(leaf.dtype).eps
        assert (grad.double() - want).norm() <= tolerance * want.norm(), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bend", BENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bend(dtype, bend, backend):
    check_cross_entropy("bias", dtype, bend, backend)


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("bend", BENDS)
@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_head(dtype, kind, bend, backend):
    check_cross_entropy(kind, dtype, bend, backend)


def check_cross_entropy(kind: str, dtype: torch.dtype, bend: str, backend: str) -> None:
    head, labels, (scale, cap) = Head(kind, dtype), masked_labels(N, V), BENDS[bend]
    loss = linear_cross_entropy(
        **head.arguments(),
        labels=labels,
        logit_scale=scale,
        softcap=cap,
        label_smoothing=0.1,
        z_loss_weight=1e-2,
        backend=backend,
    )

    def truth(raw: Tensor) -> Tensor:
        return rows_of(bent(raw, scale, cap), labels, 0.1, 1e-2)[labels != -100].mean()

    assert_as_in_fp64(head, loss, truth, torch.tensor(2.0))


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("kind", HEADS)
def test_log_probs_of_every_head_at_a_temperature(kind, backend):
    head, ids = Head(kind, torch.float32), masked_labels(N, V)
    options = {"ids": ids, "logit_scale": 1 / 1.5, "softcap": 4.0, "backend": backend}
    terms = linear_log_probs_terms(**head.arguments(), **options)
    assert torch.equal(terms.log_probs, linear_log_probs(**head.arguments(), **options))

    def truth(raw: Tensor) -> Tensor:
        log_q = bent(raw, 1 / 1.5, 4.0).log_softmax(-1)
        return torch.where(ids != -100, log_q.gather(1, ids.clamp(min=0)[:, None])[:, 0], 0.0)

    assert_as_in_fp64(head, terms.log_probs, truth, randn(N, seed=6))
    with torch.no_grad():
        log_q = bent(head.logits({k: t.double() for k, t in head.leaves.items()}), 1 / 1.5, 4.0)
        log_q = log_q.log_softmax(-1)
    entropy = torch.where(ids != -100, -(log_q.exp() * log_q).sum(-1), 0.0)
    torch.testing.assert_close(terms.entropy.double(), entropy, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_capped_logits_in_chunks(dtype, backend):
    """Several chunks, rows that are no multiple of one, and an upstream gradient a token."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(130, 16, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(4001, 16, generator=generator).to(dtype).requires_grad_()
    labels, upstream = masked_labels(130, 4001), torch.rand(130, generator=generator)
    options = {"softcap": 6.0, "workspace_mb": 1, "backend": backend, "reduction": "none"}
    rows = linear_cross_entropy(hidden, weight, labels, **options)
    wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    truth = rows_of(bent(F.linear(*wide), 1.0, 6.0), labels, 0.0, 0.0)
    truth = torch.where(labels != -100, truth, 0.0)
    torch.testing.assert_close(rows.double(), truth, rtol=1e-5, atol=1e-5)
    for grad, want in zip(
        torch.autograd.grad(rows, (hidden, weight), upstream),
        torch.autograd.grad(truth, wide, upstream.double()),
        strict=True,
    ):
        tolerance = 2e-5 + torch.finfo(dtype).eps
        assert (grad.double() - want).norm() <= tolerance * want.norm()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_cap_brings_no_excluded_class_back(backend):
    head = Head("bias", torch.float32)
    with torch.no_grad():
        head.leaves["bias"][40:] = -torch.inf
    labels = torch.arange(N)
    rows = linear_cross_entropy(
        **head.arguments(), labels=labels, softcap=3.0, reduction="none", backend=backend
    )
    raw = head.logits({name: t.detach().double() for name, t in head.leaves.items()})
    truth = rows_of(bent(raw[:, :40], 1.0, 3.0), labels, 0.0, 0.0)
    torch.testing.assert_close(rows.double(), truth, rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad(rows.sum(), [head.leaves["weight"], head.leaves["bias"]])
    assert all((grad[40:] == 0).all() for grad in grads)


def test_gradcheck():
    hidden, weight, bias, lora_a, lora_b = (
        randn(*size, seed=i).double().requires_grad_()
        for i, size in enumerate(((4, 3), (6, 3), (6,), (2, 3), (6, 2)))
    )
    labels = torch.tensor([1, -100, 5, 0])

    def loss(hidden, weight, bias, lora_a, lora_b):
        return linear_cross_entropy(
            *(hidden, LoraWeight(weight, lora_a, lora_b, 0.5), labels),
            bias=bias,
            logit_scale=1.5,
            softcap=2.0,
            label_smoothing=0.2,
            z_loss_weight=0.1,
        )

    assert torch.autograd.gradcheck(loss, (hidden, weight, bias, lora_a, lora_b))


def test_a_tied_head_receives_both_gradients():
    embedding = (0.6 * randn(V, D, seed=2)).requires_grad_()
    ids, labels = torch.arange(N) * 5 % V, masked_labels(N, V)
    loss = linear_cross_entropy(torch.tanh(embedding[ids]), embedding, labels)
    (grad,) = torch.autograd.grad(loss, embedding)
    wide = embedding.detach().double().requires_grad_()
    truth = F.cross_entropy(torch.tanh(wide[ids]) @ wide.T, labels)
    (want,) = torch.autograd.grad(truth, wide)
    torch.testing.assert_close(grad.double(), want, rtol=1e-4, atol=1e-6)


BAD = {
    "softcap": ({"softcap": 0.0}, "softcap: expected a positive finite number or None, got 0.0"),
    "scale": ({"logit_scale": -1.0}, "logit_scale: expected a positive finite number, got -1.0"),
    "text": ({"softcap": "30"}, "softcap: expected a number"),
    "lora_A": (
        {"weight": LoraWeight(torch.ones(V, D), torch.ones(R, D + 1), torch.ones(V, R))},
        r"lora_A: expected shape \[R, 12\], got \(3, 13\)",
    ),
    "lora_B": (
        {"weight": LoraWeight(torch.ones(V, D), torch.ones(R, D), torch.ones(V + 1, R))},
        r"lora_B: expected shape \(67, 3\), got \(68, 3\)",
    ),
    "bias": ({"bias": torch.ones(V + 1)}, r"bias: expected torch.float32 of shape \(67,\)"),
    "int8": ({"weight": torch.ones(V, D, dtype=torch.int8)}, "weight: .*give a QuantizedWeight"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    change, message = BAD[case]
    labels = masked_labels(N, V)
    arguments = {"hidden": torch.ones(N, D), "weight": torch.ones(V, D), "labels": labels}
    with pytest.raises((ValueError, TypeError), match=f"^{message}"):
        linear_cross_entropy(**arguments | change)


# --- beside a teacher that lists K classes


def topk_of(z_t: Tensor, k: int, **options) -> TeacherTopK:
    log_p, ids = z_t.log_softmax(-1).topk(k)
    return TeacherTopK(ids, log_p, **options)


def entropy_of(log_probs, tail: str, temperature: float):
    """[N], of what the loss compares the student with; log_probs [N, K] fp64."""
    p = log_probs.exp()
    if tail == "renormalise":
        p = (log_probs / temperature).softmax(-1)
    if tail == "bucket":
        p = torch.cat([p, 1.0 - p.sum(-1, keepdim=True)], -1)
    return -(p * p.log()).sum(-1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("tail", "temperature", "cap"),
    [
        ("bucket", 1.0, 4.0),
        ("renormalise", 2.0, None),
        ("renormalise", 2.0, 4.0),
        ("none", 1.0, None),
    ],
)
def test_by_products_beside_listed_classes(tail, temperature, cap, backend):
    head, labels = Head("bias", torch.float32), masked_labels(N, V)
    z_s = head.logits({name: t.detach().double() for name, t in head.leaves.items()})
    teacher = topk_of((z_s + randn(N, V, seed=7)).float(), 5, tail=tail)
    teacher.ids[:, 4] = -1  # absent, whatever stands beside it
    terms = linear_kd_loss_terms(
        *(head.leaves["hidden"], head.weight, teacher),
        student_bias=head.leaves["bias"],
        labels=labels,
        ce_weight=0.5,
        temperature=temperature,
        student_softcap=cap,
        by_products=True,
        backend=backend,
    )
    plain = linear_kd_loss(
        *(head.leaves["hidden"], head.weight, teacher),
        student_bias=head.leaves["bias"],
        labels=labels,
        ce_weight=0.5,
        temperature=temperature,
        student_softcap=cap,
        backend=backend,
    )
    assert torch.equal(terms.loss, plain)
    z_s = z_s if cap is None else cap * torch.tanh(z_s / cap)
    log_q, kept = (z_s / temperature).log_softmax(-1), teacher.ids[:, :4]
    top = z_s.argmax(-1)
    expected = {
        "lse": z_s.logsumexp(-1),
        "label_log_prob": z_s.log_softmax(-1).gather(1, labels.clamp(min=0)[:, None])[:, 0],
        "label_is_top": (top == labels).double(),
        "student_entropy": -(log_q.exp() * log_q).sum(-1),
        "teacher_entropy": entropy_of(teacher.log_probs[:, :4].double(), tail, temperature),
        "agreement": (top == teacher.ids[:, 0]).double(),
        "student_mass": log_q.exp().gather(1, kept).sum(-1),
        "teacher_mass": teacher.log_probs[:, :4].double().exp().sum(-1),
    }
    found = terms.by_products
    assert 0 < expected["agreement"].sum() < N
    for name, value in expected.items():
        got = getattr(found, name)
        assert not got.requires_grad
        want = torch.where(labels != -100, value, 0.0)
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5, msg=name)

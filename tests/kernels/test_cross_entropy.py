"""Losses without a teacher, and what belongs to temperature 1 beside a divergence, against fp64.

The truth is torch's own cross entropy and definitions written out, over whole logits in fp64;
nothing of the project's reference takes part in it.
"""

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from modxfer_fast import (
    kd_loss,
    linear_cross_entropy,
    linear_kd_loss,
    linear_kd_loss_terms,
    linear_log_probs,
    linear_log_probs_terms,
)
from modxfer_fast.kernels.common import KDSpec
from modxfer_fast.kernels.common.rows import Launch
from modxfer_fast.kernels.kd_loss.reference import hard_terms_reference
from modxfer_fast.measure.memory import peak_mib
from tests.inputs import (
    BACKENDS,
    DTYPES,
    NATIVE,
    close_logits,
    linear_inputs,
    masked_labels,
    row_weights,
)

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    # NumPy, which interprets Triton, warns of infinities that the kernels mask
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]
INF = float("inf")


@dataclasses.dataclass
class Inputs:
    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None
    labels: Tensor  # [N]

    def leaves(self) -> dict[str, Tensor]:
        named = {"hidden": self.hidden, "weight": self.weight, "bias": self.bias}
        return {name: t for name, t in named.items() if t is not None and t.requires_grad}


def inputs_of(
    n: int, vocab_size: int, dtype: torch.dtype = torch.float32, bias: bool = True
) -> Inputs:
    """Logits of std 3 with a class that stands out; every fourth label is -100."""
    made = linear_inputs(n, vocab_size, dtype, bias=bias)
    labels = masked_labels(n, vocab_size)
    return Inputs(made.student_hidden, made.student_weight, made.student_bias, labels)


def rows_of(z: Tensor, labels: Tensor, smoothing: float, z_loss_weight: float) -> Tensor:
    """Of whole logits: the formulas, written out."""
    safe = labels.clamp(min=0)
    log_q = z - z.exp().sum(-1, keepdim=True).log()
    target = torch.full_like(z, smoothing / z.shape[-1])
    target[torch.arange(len(z)), safe] += 1 - smoothing
    lse = z.exp().sum(-1).log()
    return -(target * log_q).sum(-1) + z_loss_weight * lse**2


def truth(inputs: Inputs, weights: Tensor, smoothing: float = 0.0, z_loss_weight: float = 0.0):
    """{"loss", "rows", gradients of the loss} in fp64; weights [N] as of `row_weights`."""
    leaves = {k: t.detach().double().requires_grad_() for k, t in inputs.leaves().items()}
    hidden = leaves.get("hidden", inputs.hidden.double())
    weight = leaves.get("weight", inputs.weight.double())
    bias = leaves.get("bias", None if inputs.bias is None else inputs.bias.double())
    hidden = torch.where((weights != 0)[:, None], hidden, 0.0)
    rows = rows_of(F.linear(hidden, weight, bias), inputs.labels, smoothing, z_loss_weight)
    rows = torch.where(weights != 0, rows * weights, 0.0)
    grads = torch.autograd.grad(rows.sum(), list(leaves.values())) if leaves else ()
    return {
        "loss": rows.sum().detach(),
        "rows": rows.detach(),
        **dict(zip(leaves, grads, strict=True)),
    }


def check(inputs: Inputs, upstream: float = 1.0, **options) -> None:
    known = ("ignore_index", "reduction", "normalizer")
    weights = row_weights(
        len(inputs.labels),
        inputs.labels,
        options.get("token_weights"),
        **{name: options[name] for name in known if name in options},
    )
    expected = truth(
        inputs, weights, options.get("label_smoothing", 0.0), options.get("z_loss_weight", 0.0)
    )
    loss = linear_cross_entropy(
        inputs.hidden, inputs.weight, inputs.labels, bias=inputs.bias, **options
    )
    leaves = inputs.leaves()
    grads = torch.autograd.grad(loss, list(leaves.values()), torch.full_like(loss, upstream))
    assert_close("rows" if loss.dim() else "loss", loss.detach(), expected, inputs.hidden.dtype)
    for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
        assert grad.dtype == leaf.dtype
        assert_close(name, grad / upstream, expected, leaf.dtype)


def assert_close(name: str, got: Tensor, expected: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Within the rounding of fp32 sums, and of one rounding to the dtype of a gradient."""
    want = expected[name]
    eps = torch.finfo(torch.promote_types(got.dtype, torch.float32)).eps
    rounding = torch.finfo(dtype).eps if name not in ("loss", "rows") else 0.0
    error = (got.double() - want).norm()
    assert error <= (64 * eps + rounding) * want.norm() + 8 * eps, (name, error, want.norm())


# --- linear_cross_entropy


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_option(dtype, reduction, backend):
    inputs = inputs_of(13, 301, dtype)
    weights = 0.25 + torch.rand(13, generator=torch.Generator().manual_seed(1))
    pairs = ((0.0, 0.0), (0.1, 0.0), (0.0, 1e-2), (0.2, 1e-2))
    for smoothing, z_loss_weight in pairs[:: 3 if backend == "triton" else 1]:
        check(
            inputs,
            2.0,
            token_weights=weights,
            reduction=reduction,
            label_smoothing=smoothing,
            z_loss_weight=z_loss_weight,
            backend=backend,
        )


@pytest.mark.parametrize("backend", NATIVE)
# one class; every remainder of the 16 lanes; a block of 1024 that is summed in fp32, and around it
@pytest.mark.parametrize("vocab_size", [*range(1, 34), 1023, 1024, 1025, 2065])
def test_vocab_sizes(vocab_size, backend):
    check(inputs_of(3, vocab_size), backend=backend, label_smoothing=0.1, z_loss_weight=1e-2)
    check(inputs_of(3, vocab_size), backend=backend)


@pytest.mark.parametrize("backend", NATIVE)
def test_equals_torch(backend):
    """cross_entropy of whole logits, and torch's own linear_cross_entropy where it has one."""
    inputs = inputs_of(17, 200)
    z = F.linear(inputs.hidden.double(), inputs.weight.double(), inputs.bias.double())
    for smoothing, reduction in itertools.product((0.0, 0.3), ("mean", "sum", "none")):
        expected = F.cross_entropy(z, inputs.labels, reduction=reduction, label_smoothing=smoothing)
        got = linear_cross_entropy(
            inputs.hidden,
            inputs.weight,
            inputs.labels,
            bias=inputs.bias,
            reduction=reduction,
            label_smoothing=smoothing,
            backend=backend,
        )
        torch.testing.assert_close(got.double(), expected, rtol=2e-6, atol=2e-6)
    if hasattr(F, "linear_cross_entropy"):
        expected = F.linear_cross_entropy(
            inputs.hidden, inputs.weight, inputs.labels, linear_bias=inputs.bias
        )
        got = linear_cross_entropy(
            inputs.hidden, inputs.weight, inputs.labels, bias=inputs.bias, backend=backend
        )
        torch.testing.assert_close(got, expected, rtol=2e-6, atol=2e-6)


def test_gradcheck():
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(size, dtype=torch.float64, generator=generator).requires_grad_()
        for size in ((4, 3), (6, 3), (6,))
    )
    labels = torch.tensor([1, -100, 5, 0])
    for reduction in ("mean", "none"):

        def function(hidden, weight, bias, reduction=reduction):
            options = {"label_smoothing": 0.2, "z_loss_weight": 0.1, "reduction": reduction}
            return linear_cross_entropy(hidden, weight, labels, bias=bias, **options)

        assert torch.autograd.gradcheck(function, (hidden, weight, bias))
    assert torch.autograd.gradcheck(
        lambda *leaves: linear_log_probs(leaves[0], leaves[1], labels, bias=leaves[2]),
        (hidden, weight, bias),
    )
    spec = KDSpec(kd_weight=0.0, ce_weight=1.0, label_smoothing=0.2, z_loss_weight=0.1)
    z = torch.randn(4, 6, dtype=torch.float64, generator=generator).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: hard_terms_reference(z, labels, spec), z)


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_chunks_and_a_frozen_head(dtype, backend):
    inputs = inputs_of(300, 2000, dtype)
    for frozen in (False, True):
        inputs.weight.requires_grad_(not frozen)
        check(inputs, backend=backend, workspace_mb=1, z_loss_weight=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("garbage", [0.0, float("nan"), INF])
def test_ignored_rows(garbage, backend):
    inputs = inputs_of(11, 100)
    ignored = inputs.labels == -100
    with torch.no_grad():
        inputs.hidden[ignored] += garbage
    for num_valid in (None, int((~ignored).sum())):
        check(inputs, backend=backend, num_valid=num_valid, z_loss_weight=1e-2)
    inputs.labels[:] = -100
    loss = linear_cross_entropy(
        inputs.hidden, inputs.weight, inputs.labels, backend=backend, z_loss_weight=1e-2
    )
    assert loss == 0
    assert all((g == 0).all() for g in torch.autograd.grad(loss, [inputs.hidden, inputs.weight]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows_and_leading_dimensions(backend):
    inputs = inputs_of(12, 50, bias=False)
    flat = linear_cross_entropy(
        inputs.hidden, inputs.weight, inputs.labels, reduction="none", backend=backend
    )
    shaped = linear_cross_entropy(
        inputs.hidden.view(2, 2, 3, -1),
        inputs.weight,
        inputs.labels.view(2, 2, 3),
        reduction="none",
        backend=backend,
    )
    assert torch.equal(flat.view(2, 2, 3), shaped)
    terms = linear_log_probs_terms(
        inputs.hidden[:0], inputs.weight, inputs.labels[:0], backend=backend
    )
    assert [len(term) for term in terms] == [0, 0, 0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_logits(backend):
    inputs = inputs_of(6, 120)
    for size in (1e2, 1e4):
        with torch.no_grad():
            inputs.bias[:] = torch.arange(120).remainder(7).sub(3.0) * (size / 3)
        z = F.linear(inputs.hidden.double(), inputs.weight.double(), inputs.bias.double())
        expected = F.cross_entropy(z, inputs.labels, reduction="none", label_smoothing=0.1)
        leaf = inputs.hidden
        got = linear_cross_entropy(
            leaf,
            inputs.weight,
            inputs.labels,
            bias=inputs.bias,
            label_smoothing=0.1,
            reduction="none",
            backend=backend,
        )
        torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-6 * size)
        (grad,) = torch.autograd.grad(got.sum(), leaf)
        assert grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_excluded_classes_and_broken_rows(backend):
    inputs = inputs_of(6, 40)
    inputs.labels = torch.arange(6)
    with torch.no_grad():
        inputs.bias[20:] = -INF
    check_finite = linear_cross_entropy(
        inputs.hidden,
        inputs.weight,
        inputs.labels,
        bias=inputs.bias,
        reduction="none",
        z_loss_weight=0.1,
        backend=backend,
    )
    z = F.linear(inputs.hidden.double(), inputs.weight.double()[:20], inputs.bias.double()[:20])
    expected = rows_of(z, inputs.labels, 0.0, 0.1)
    torch.testing.assert_close(check_finite.double(), expected, rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad(check_finite.sum(), [inputs.weight, inputs.bias])
    assert all((grad[20:] == 0).all() for grad in grads)
    with torch.no_grad():
        inputs.hidden[2, 0] = float("nan")
    rows = linear_cross_entropy(
        inputs.hidden, inputs.weight, inputs.labels, reduction="none", backend=backend
    )
    assert rows.isnan().tolist() == [False, False, True, False, False, False]


# --- log-probabilities of given tokens


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_log_probs_and_what_comes_with_them(dtype, backend):
    inputs = inputs_of(13, 211, dtype)
    with torch.no_grad():  # a row whose token is its largest
        z = F.linear(inputs.hidden.double(), inputs.weight.double(), inputs.bias.double())
        inputs.labels[0] = z[0].argmax()
    valid = inputs.labels != -100
    log_q = z.log_softmax(-1)
    picked = log_q.gather(1, inputs.labels.clamp(min=0)[:, None])[:, 0]
    args = (inputs.hidden, inputs.weight, inputs.labels)
    terms = linear_log_probs_terms(*args, bias=inputs.bias, backend=backend)
    tolerance = {"rtol": 3e-6, "atol": 3e-6}
    entropy = -(log_q.exp() * log_q).sum(-1)
    is_top = (inputs.labels == z.argmax(-1)).double()
    for got, expected in zip(terms, (picked, entropy, is_top), strict=True):
        want = torch.where(valid, expected, 0.0)
        torch.testing.assert_close(got.detach().double(), want, **tolerance)
    assert terms.log_probs.requires_grad
    assert not terms.entropy.requires_grad
    assert not terms.is_top.requires_grad
    log_probs = linear_log_probs(*args, bias=inputs.bias, backend=backend)
    assert torch.equal(log_probs, terms.log_probs)
    # a gradient of its own for each token, as a policy gradient has it
    upstream = torch.randn(13, generator=torch.Generator().manual_seed(2))
    leaves = inputs.leaves()
    grads = torch.autograd.grad(log_probs, list(leaves.values()), upstream)
    expected = truth(inputs, -upstream.double() * valid)
    for name, grad in zip(leaves, grads, strict=True):
        assert_close(name, grad, expected, dtype)


# --- beside a divergence


def dense(z_s: Tensor, z_t: Tensor, labels: Tensor, temperature: float) -> dict[str, Tensor]:
    """By-products of whole logits in fp64, 0 where a row is ignored."""
    log_q, log_p = (F.log_softmax(z / temperature, -1) for z in (z_s, z_t))
    found = {
        "lse": z_s.logsumexp(-1),
        "label_log_prob": z_s.log_softmax(-1).gather(1, labels.clamp(min=0)[:, None])[:, 0],
        "label_is_top": (z_s.argmax(-1) == labels).double(),
        "student_entropy": -(log_q.exp() * log_q).sum(-1),
        "teacher_entropy": -(log_p.exp() * log_p).sum(-1),
        "agreement": (z_s.argmax(-1) == z_t.argmax(-1)).double(),
    }
    return {name: torch.where(labels != -100, value, 0.0) for name, value in found.items()}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("temperature", [1.0, 2.0], ids=lambda t: f"T{t}")
def test_beside_a_divergence(temperature, divergence, backend):
    """Loss and gradients are those of the sum of parts, and by-products come with them."""
    inputs = linear_inputs(13, 301, delta=1.0, bias=True, labels=True)
    tensors = inputs.tensors()
    options = {"divergence": divergence, "temperature": temperature, "backend": backend}
    alone = {"kd_weight": 0.7, "ce_weight": 0.0}
    parts = linear_kd_loss(**tensors, **options, **alone)
    hard = linear_cross_entropy(
        inputs.student_hidden,
        inputs.student_weight,
        inputs.labels,
        bias=inputs.student_bias,
        label_smoothing=0.1,
        backend=backend,
    )
    lse = linear_cross_entropy(
        inputs.student_hidden,
        inputs.student_weight,
        inputs.labels,
        bias=inputs.student_bias,
        z_loss_weight=1e-2,
        backend=backend,
    ) - linear_cross_entropy(
        inputs.student_hidden,
        inputs.student_weight,
        inputs.labels,
        bias=inputs.student_bias,
        backend=backend,
    )
    expected = parts + 0.4 * hard + lse
    together = {"kd_weight": 0.7, "ce_weight": 0.4, "label_smoothing": 0.1, "z_loss_weight": 1e-2}
    leaves = list(inputs.trainable().values())
    for by_products in (False, True):
        terms = linear_kd_loss_terms(**tensors, **options, **together, by_products=by_products)
        torch.testing.assert_close(terms.loss, expected, rtol=1e-5, atol=1e-5)
        for got, want in zip(
            torch.autograd.grad(terms.loss, leaves),
            torch.autograd.grad(expected, leaves, retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(terms.z_loss * 1e-2, lse.detach(), rtol=1e-4, atol=1e-4)
        assert (terms.by_products is not None) == by_products
    with torch.no_grad():
        z_s = F.linear(
            inputs.student_hidden.double(),
            inputs.student_weight.double(),
            inputs.student_bias.double(),
        )
        z_t = F.linear(
            inputs.teacher_hidden.double(),
            inputs.teacher_weight.double(),
            inputs.teacher_bias.double(),
        )
        for objective in (together, alone):  # with the label's term, and without it
            found = linear_kd_loss_terms(
                **tensors, **options, **objective, by_products=True
            ).by_products
            for name, want in dense(z_s, z_t, inputs.labels, temperature).items():
                got = getattr(found, name).double()
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("labelled", [False, True])
def test_kd_loss_with_z_loss_and_label_smoothing(labelled, dtype, backend):
    student, teacher = close_logits(7, 130, dtype, delta=1.0)
    labels = masked_labels(7, 130) if labelled else None
    ce_weight = 0.4 if labelled else 0.0
    hard = {"ce_weight": ce_weight, "label_smoothing": 0.2, "z_loss_weight": 1e-2}
    options = {"labels": labels, "temperature": 2.0, "backend": backend, "reduction": "sum"}
    got = kd_loss(student, teacher, **options, **hard)
    (dlogits,) = torch.autograd.grad(got, student)
    z = student.detach().double().requires_grad_()
    valid = torch.ones(7) if labels is None else (labels != -100)
    log_q, log_p = (F.log_softmax(x / 2.0, -1) for x in (z, teacher.double()))
    rows = (log_p.exp() * (log_p - log_q)).sum(-1) + 1e-2 * z.logsumexp(-1) ** 2
    if labelled:
        rows = rows + ce_weight * F.cross_entropy(z, labels, reduction="none", label_smoothing=0.2)
    (expected,) = torch.autograd.grad((rows * valid).sum(), z)
    torch.testing.assert_close(got.double(), (rows * valid).sum(), rtol=1e-5, atol=1e-5)
    tolerance = 1e-5 + torch.finfo(dtype).eps
    assert (dlogits.double() - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("backend", NATIVE)
def test_z_loss_needs_no_labels(backend):
    inputs = linear_inputs(9, 100)
    tensors = inputs.tensors()
    plain = linear_kd_loss(**tensors, backend=backend)
    with_z = linear_kd_loss(**tensors, z_loss_weight=0.1, backend=backend)
    z = inputs.student_hidden @ inputs.student_weight.T
    expected = plain + 0.1 * z.logsumexp(-1).square().mean()
    torch.testing.assert_close(with_z, expected, rtol=1e-5, atol=1e-5)


# --- memory, compilation, bad input


def test_one_buffer_of_logits():
    """The peak above inputs and gradients stays within the workspace."""
    inputs = inputs_of(2048, 4000, bias=False)

    leaves = (inputs.hidden, inputs.weight)

    def step():
        loss = linear_cross_entropy(*leaves, inputs.labels, workspace_mb=4)
        return dict(zip("hw", torch.autograd.grad(loss, leaves), strict=True))

    assert 2.0 <= peak_mib(step, "cpu") <= 1.05 * 4


@pytest.mark.parametrize("by_products", [False, True])
def test_ops_are_sound(by_products):
    inputs = inputs_of(5, 20)
    weights = torch.rand(5).masked_fill(inputs.labels == -100, 0.0)
    spec = KDSpec(kd_weight=0.0, ce_weight=1.0, z_loss_weight=0.1).checked()
    args = (inputs.hidden, inputs.weight, inputs.bias, inputs.labels, weights, -100, None, None)
    args += (spec.numbers(), spec.names(), *Launch(64, "reference"), by_products)
    torch.library.opcheck(torch.ops.modxfer.linear_cross_entropy_rows.default, args)
    torch.library.opcheck(
        torch.ops.modxfer.linear_cross_entropy_fwd.default, (*args, [True, True, True])
    )


BAD = {
    "hidden": (lambda a: a | {"hidden": a["hidden"][:, :-1]}, "hidden: expected shape"),
    "weight": (lambda a: a | {"weight": a["weight"][0]}, "weight: expected shape"),
    "bias": (lambda a: a | {"bias": a["weight"]}, "bias: expected"),
    "labels": (lambda a: a | {"labels": None}, "labels: expected a tensor"),
    "dtype": (lambda a: a | {"labels": a["labels"].int()}, "labels: expected torch.int64"),
    "value": (lambda a: a | {"labels": a["labels"].clamp(min=0) + 50}, "labels: expected values"),
    "smoothing": (lambda a: a | {"label_smoothing": 1.5}, r"label_smoothing: .* \[0, 1\], got 1.5"),
    "z-loss": (lambda a: a | {"z_loss_weight": -1.0}, "z_loss_weight: .* at least 0, got -1"),
    "nan": (lambda a: a | {"z_loss_weight": float("nan")}, "z_loss_weight: .* at least 0"),
    "text": (lambda a: a | {"label_smoothing": "0.1"}, "label_smoothing: expected a number"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    inputs = inputs_of(5, 20)
    change, message = BAD[case]
    good = {"hidden": inputs.hidden, "weight": inputs.weight, "labels": inputs.labels}
    with pytest.raises((ValueError, TypeError), match=f"^{message}"):
        linear_cross_entropy(**change(good))


def test_bad_ids():
    inputs = inputs_of(5, 20)
    for ids, message in (
        (inputs.labels[:-1], "ids: expected shape"),
        (inputs.labels.double(), "ids: expected torch.int64"),
        (inputs.labels.clamp(min=0) + 20, "ids: expected values"),
        (None, "ids: expected a tensor"),
    ):
        with pytest.raises((ValueError, TypeError), match=f"^{message}"):
            linear_log_probs(inputs.hidden, inputs.weight, ids)

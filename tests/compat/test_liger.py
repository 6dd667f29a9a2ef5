"""`compat.liger` beside the Liger that is installed: names, defaults, losses and gradients.

Liger's Triton kernels run in the interpreter here. KLDIV and TVD, which it cannot interpret, are
compared with what their formulas are in torch.
"""

import importlib.util
import inspect

import pytest
import torch
import torch.nn.functional as F

from modxfer_fast.compat import liger as ours

N, V, D_S, D_T, IGNORED = 9, 13, 6, 8, 3
CHUNKED = ["LigerFusedLinearCosineSimilarityLoss", "LigerFusedLinearJSDLoss"]

needs_liger = pytest.mark.skipif(
    importlib.util.find_spec("liger_kernel") is None,
    reason="liger-kernel is not installed",
)


def peer(name: str) -> type:
    import liger_kernel.chunked_loss as chunked
    import liger_kernel.transformers as transformers

    return getattr(chunked, name, None) or getattr(transformers, name)


@pytest.fixture
def heads():
    """Student's states, head and bias, which are trained, the teacher's, and labels."""
    generator = torch.Generator().manual_seed(0)

    def make(*shape):
        return torch.randn(*shape, generator=generator)

    student = [make(N, D_S), make(V, D_S), make(V)]
    labels = torch.randint(0, V, (N,), generator=generator)
    labels[:3] = IGNORED
    return [t.requires_grad_() for t in student], [make(N, D_T), make(V, D_T), make(V)], labels


def rows(count: int = 2):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(N, V, generator=generator).log_softmax(-1) for _ in range(count)]


def assert_same(expected, got, inputs):
    """Values, dtypes and gradients, under an upstream gradient that is not 1."""
    expected, got = (x if isinstance(x, tuple) else (x,) for x in (expected, got))
    for a, b in zip(expected, got, strict=True):
        torch.testing.assert_close(b, a, rtol=2e-5, atol=1e-6)
    wanted = torch.autograd.grad((0.7 * expected[0]).sum(), inputs)
    for a, b in zip(wanted, torch.autograd.grad((0.7 * got[0]).sum(), inputs), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-6)


@needs_liger
@pytest.mark.parametrize("name", ours.__all__)
def test_arguments_and_defaults_are_ligers(name):
    mine, theirs = getattr(ours, name), peer(name)
    for function in ("__init__", "forward"):
        a, b = (inspect.signature(getattr(kind, function)).parameters for kind in (mine, theirs))
        assert list(a) == list(b), function
        for key, value in b.items():
            # a default where Liger has none does no harm
            if value.default is not inspect.Parameter.empty:
                assert a[key].default == value.default, key


# --- chunked losses


@needs_liger
@pytest.mark.parametrize("name", CHUNKED)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("hard", "soft", "beta", "temperature"),
    [(0.5, 0.5, 0.5, 1.0), (0.0, 1.0, 0.1, 2.0), (0.3, 0.6, 0.0, 0.5), (1.0, 0.0, 1.0, 1.0)],
)
def test_chunked_losses(name, heads, bias, hard, soft, beta, temperature):
    (hidden, weight, b_s), (t_hidden, t_weight, b_t), labels = heads
    options = (hard, soft, beta, IGNORED, temperature, False, 4, True)
    tensors = (hidden, weight, t_hidden, t_weight, labels, *((b_s, b_t) if bias else ()))
    expected, got = (kind(*options)(*tensors) for kind in (peer(name), getattr(ours, name)))
    assert not got[1].requires_grad
    assert not got[2].requires_grad
    assert_same(expected, got, (hidden, weight, *((b_s,) if bias else ())))


@needs_liger
@pytest.mark.parametrize("hard", [0.0, 0.4])
@pytest.mark.parametrize("is_told", [False, True])
@pytest.mark.parametrize("name", CHUNKED)
def test_a_padded_teacher_sees_logits_of_0(name, heads, hard, is_told):
    (hidden, weight, bias), (t_hidden, t_weight, b_t), labels = heads
    generator = torch.Generator().manual_seed(2)
    t_weight = torch.cat([t_weight, torch.randn(4, D_T, generator=generator)])
    b_t = torch.cat([b_t, torch.zeros(4)])
    tensors = (hidden, weight, t_hidden, t_weight, labels, bias, b_t)
    options = (hard, 0.6, 0.5, IGNORED, 2.0, False, 1024, is_told)
    kinds = (peer(name), getattr(ours, name))
    expected, got = (kind(*options)(*tensors) for kind in kinds)
    assert_same(expected, got, (hidden, weight, bias))


def test_chunk_size_bounds_the_tokens_in_flight(heads, monkeypatch):
    (hidden, weight, _), (t_hidden, t_weight, _), labels = heads
    seen = []
    plan = ours.linear_kd_loss_terms

    def spy(*args, **options):
        seen.append(options["workspace_mb"])
        return plan(*args, **options)

    monkeypatch.setattr(ours, "linear_kd_loss_terms", spy)
    for chunk_size in (1, 2**20):
        loss = ours.LigerFusedLinearJSDLoss(chunk_size=chunk_size)
        loss(hidden, weight, t_hidden, t_weight, labels)
    assert seen == [1, 2 * V * 4]


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"beta": 1.5}, "beta"),
        ({"temperature": 0.0}, "temperature"),
        ({"chunk_size": 0}, "chunk_size"),
    ],
)
def test_a_bad_option_is_refused_when_the_loss_is_made(options, name):
    with pytest.raises(ValueError, match=f"{name}: expected"):
        ours.LigerFusedLinearJSDLoss(**options)


# --- losses with Triton kernels


@needs_liger
@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize(("beta", "temperature"), [(0.5, 1.0), (0.1, 2.0), (0.0, 1.0), (1.0, 0.5)])
def test_fused_linear_jsd(heads, labelled, beta, temperature):
    (hidden, weight, _), (t_hidden, t_weight, _), labels = heads
    tensors = (hidden, weight, t_hidden, t_weight, labels if labelled else None)
    kinds = (peer("LigerFusedLinearJSD"), ours.LigerFusedLinearJSD)
    expected, got = (kind(beta, IGNORED, temperature)(*tensors) for kind in kinds)
    assert_same(expected, got, (hidden, weight))


@needs_liger
@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_fused_linear_kl_div(heads, labelled, reduction, temperature):
    (hidden, weight, _), _, labels = heads
    target = rows(1)[0].exp()
    target[:, 0] = 0.0
    target = target / target.sum(-1, keepdim=True)
    tensors = (hidden, weight, target, labels if labelled else None)
    kinds = (peer("LigerFusedLinearKLDivLoss"), ours.LigerFusedLinearKLDivLoss)
    expected, got = (kind(reduction, IGNORED, temperature)(*tensors) for kind in kinds)
    assert_same(expected, got, (hidden, weight))


def test_a_temperature_rounds_no_half_precision_state():
    generator = torch.Generator().manual_seed(0)
    hidden, weight, noise = (
        torch.randn(*size, generator=generator).bfloat16() for size in ((40, 64), (V, 64), (40, V))
    )
    # near the student, whose gradient is then a small difference
    target = (F.linear(hidden.float(), weight.float()) / 3.0 + 0.1 * noise).softmax(-1)
    grads = []
    for dtype in (torch.bfloat16, torch.float64):
        leaves = [t.to(dtype).requires_grad_() for t in (hidden, weight)]
        kind = ours.LigerFusedLinearKLDivLoss(temperature=3.0)
        loss = kind(*leaves, target.to(torch.promote_types(dtype, torch.float32)))
        grads.append(torch.autograd.grad(loss, leaves))
    for grad, want in zip(*grads, strict=True):
        assert (grad.double() - want).norm() <= 2**-8 * want.norm()


@needs_liger
@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_jsd_of_log_probs(heads, labelled, beta, dtype, monkeypatch):
    monkeypatch.setattr(ours, "_ROW_BYTES", 4 * V * 4)  # several spans of rows
    log_q, log_p = (x.to(dtype) for x in rows())
    log_q.requires_grad_()
    labels = heads[2] if labelled else None
    kinds = (peer("LigerJSD"), ours.LigerJSD)
    expected, got = (kind(beta, IGNORED)(log_q, log_p, labels) for kind in kinds)
    assert got.dtype == dtype
    if dtype == torch.float32:
        assert_same(expected, got, (log_q,))
    else:
        torch.testing.assert_close(got, expected)


def test_jsd_of_classes_that_neither_gives_a_chance():
    log_q = torch.tensor([[0.0, -torch.inf], [-torch.inf, 0.0]], requires_grad=True)
    log_p = torch.tensor([[0.0, -torch.inf], [0.0, -torch.inf]])
    loss = ours.LigerJSD()(log_q, log_p)
    loss.backward()
    torch.testing.assert_close(loss, torch.tensor(2.0).log() / 2)  # rows of 0 and log 2
    assert torch.isfinite(log_q.grad).all()


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean"])
@pytest.mark.parametrize("log_target", [False, True])
def test_kl_div_is_torchs(reduction, log_target):
    log_q, log_p = rows()
    log_q.requires_grad_()
    target = log_p if log_target else log_p.exp()
    options = {"reduction": reduction, "log_target": log_target}
    expected = F.kl_div(log_q, target, **options)
    assert_same(expected, ours.LigerKLDIVLoss(**options)(log_q, target), (log_q,))


def test_kl_div_clamps_a_target_of_0():
    log_q = torch.zeros(1, 2, requires_grad=True)
    loss = ours.LigerKLDIVLoss(1e-3, reduction="none")(log_q, torch.tensor([[0.0, 1e-4]]))
    torch.testing.assert_close(loss, torch.tensor([[0.0, 1e-4]]) * torch.tensor(1e-3).log())


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean"])
@pytest.mark.parametrize("labelled", [False, True])
def test_tvd_is_its_formula(heads, reduction, labelled):
    p, q = (x.exp() for x in rows())
    q[0] = p[0]  # a tie has no gradient
    p.requires_grad_()
    labels = heads[2] if labelled else None
    counts = torch.full((N,), True) if labels is None else labels != IGNORED
    addends = (p - q).abs() / 2 * counts[:, None]
    number = counts.sum()
    divisor = {"mean": number * V, "batchmean": number}.get(reduction, torch.tensor(1))
    expected = addends if reduction == "none" else addends.sum() / divisor
    assert_same(expected, ours.LigerTVDLoss(reduction, IGNORED)(p, q, labels), (p,))


@pytest.mark.parametrize("kind", [ours.LigerJSD, ours.LigerTVDLoss])
@pytest.mark.parametrize("there", [True, False])
def test_no_row_counts(kind, there):
    x, y = (values.exp()[: N if there else 0] for values in rows())
    x.requires_grad_()
    loss = kind()(x, y, torch.full((N,), -100) if there else None)
    loss.backward()
    assert loss == 0
    assert not x.grad.any()


def test_shapes_are_told():
    with pytest.raises(ValueError, match=r"log_q: expected shape \[N, V\], got \(2, 3, 4\)"):
        ours.LigerJSD()(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match=r"q: expected the shape of p"):
        ours.LigerTVDLoss()(torch.zeros(3, 4), torch.zeros(3, 5))
    with pytest.raises(ValueError, match=r"shift_labels: expected shape \(3,\), got \(4,\)"):
        ours.LigerTVDLoss()(torch.zeros(3, 4), torch.zeros(3, 4), torch.zeros(4))
    with pytest.raises(ValueError, match="reduction: expected one of"):
        ours.LigerKLDIVLoss(reduction="total")

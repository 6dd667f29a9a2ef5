"""Gradients of linear_kd_loss are made beside the loss, in the backward, or not at all."""

import pytest
import torch

from modxfer_fast import TeacherMixture, TeacherTopK, linear_cross_entropy, linear_kd_loss
from modxfer_fast.kernels.common import scratch
from modxfer_fast.kernels.linear_kd_loss import LoraWeight, QuantizedWeight, TeacherHead
from modxfer_fast.measure.memory import peak_mib
from tests.inputs import BACKENDS, DTYPES, NATIVE, linear_inputs
from tests.support.gemms import gemms

# NumPy, which interprets Triton, warns of infinities that the kernels mask
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
OPTIONS = {"divergence": "jsd", "beta": 0.3, "temperature": 2.0, "kd_weight": 0.7, "ce_weight": 0.4}
FORWARD, RECOMPUTE = "forward", "recompute"


def loss_of(inputs, **options):
    return linear_kd_loss(**inputs.tensors(), **OPTIONS, **options)


def grads_of(loss, inputs, **options):
    return torch.autograd.grad(3.0 * loss, list(inputs.trainable().values()), **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bits_are_those_of_the_forward(dtype, backend):
    n, v = (90, 4000) if backend in NATIVE else (5, 130)
    inputs = linear_inputs(n, v, dtype, bias=True, labels=True, token_weights=True)
    runs = []
    for gradients in (FORWARD, RECOMPUTE):
        options = {"workspace_mb": 1, "backend": backend}
        loss = loss_of(inputs, gradients=gradients, **options)
        runs.append((loss, *grads_of(loss, inputs)))
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("gradients", [FORWARD, RECOMPUTE])
def test_a_second_backward(gradients):
    inputs = linear_inputs(12, 100, bias=True, labels=True)
    loss = loss_of(inputs, gradients=gradients)
    first = [grad.clone() for grad in grads_of(loss, inputs, retain_graph=True)]
    for one, other in zip(first, grads_of(loss, inputs), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(RuntimeError, match="second time"):
        grads_of(loss, inputs)
    with pytest.raises(RuntimeError, match="expected a backward without create_graph"):
        grads_of(loss_of(inputs, gradients=gradients), inputs, create_graph=True)


@pytest.mark.parametrize("frozen", ["student_hidden", "student_weight", "student_bias"])
def test_gradcheck_of_what_is_trained(frozen):
    inputs = linear_inputs(5, 11, torch.float64, d_s=3, d_t=4, bias=True, labels=True)
    inputs.trainable()[frozen].requires_grad_(False)
    names = [name for name, leaf in inputs.trainable().items() if leaf.requires_grad]

    def loss(*leaves):
        tensors = inputs.tensors() | dict(zip(names, leaves, strict=True))
        return linear_kd_loss(**tensors, **OPTIONS, gradients=RECOMPUTE)

    assert torch.autograd.gradcheck(loss, [inputs.trainable()[name] for name in names])


@pytest.mark.parametrize("backend", NATIVE)
def test_products_of_each_half(backend):
    n, v, d_s, d_t = 10, 90, 24, 40
    inputs = linear_inputs(n, v)
    logits = [[n, v, d_s], [n, v, d_t]]
    dense = [[n, d_s, v], [v, d_s, n]]
    for gradients, of_forward, of_backward in (
        (FORWARD, logits + dense, []),
        (RECOMPUTE, logits, logits + dense),
    ):
        losses = []

        def forward(options=(gradients, backend), losses=losses):
            named = dict(zip(("gradients", "backend"), options, strict=True))
            losses.append(linear_kd_loss(**inputs.tensors(), **named))

        assert sorted(gemms(forward)) == sorted(of_forward)
        assert sorted(gemms(losses[0].backward)) == sorted(of_backward)


@pytest.mark.parametrize("gradients", [FORWARD, RECOMPUTE])
@pytest.mark.parametrize("why", ["no_grad", "frozen"])
def test_no_gradient_is_made_where_none_is_wanted(why, gradients, monkeypatch):
    """Neither products, nor a row kernel that writes dlogits, nor the room of a gradient."""
    from modxfer_fast.kernels.kd_loss import cpp_impl

    def refused(*_):
        raise AssertionError("dlogits were made")

    monkeypatch.setattr(cpp_impl, "kd_loss_fwd_bwd", refused)
    n, v, d_s, d_t = 64, 4000, 256, 8
    inputs = linear_inputs(n, v, d_s=d_s, d_t=d_t)
    for leaf in inputs.trainable().values():
        leaf.requires_grad_(why == "no_grad")

    def step():
        with torch.set_grad_enabled(why != "no_grad"):
            loss = linear_kd_loss(
                **inputs.tensors(), gradients=gradients, workspace_mb=2, backend="cpp"
            )
        assert not loss.requires_grad

    products = gemms(step)
    assert {tuple(product[1:]) for product in products} == {(v, d_s), (v, d_t)}
    assert sum(product[0] for product in products) == 2 * n
    peak = peak_mib(step, "cpu")
    # the gradient of the weight alone would take as much again
    assert 1.0 < peak <= 2.02 < 4 * v * d_s / 2**20


@pytest.mark.parametrize("dtype", DTYPES)
def test_recomputing_keeps_nothing_for_the_backward(dtype):
    n, v, d_s, workspace_mb = 256, 4000, 256, 2
    inputs = linear_inputs(n, v, dtype, d_s=d_s, d_t=8)
    of_gradients = dtype.itemsize * (n + v) * d_s / 2**20
    kept, peaks = {}, {}
    for gradients in (FORWARD, RECOMPUTE):
        options = {"gradients": gradients, "workspace_mb": workspace_mb}
        losses = []

        def forward(options=options, losses=losses):
            losses.append(linear_kd_loss(**inputs.tensors(), **options))
            scratch.release_workspace()

        def both(options=options):
            loss = linear_kd_loss(**inputs.tensors(), **options)
            other = torch.empty(2**22, dtype=torch.uint8)  # what lies between forward and backward
            del other
            grads = torch.autograd.grad(loss, list(inputs.trainable().values()))
            return {str(i): grad for i, grad in enumerate(grads)}

        kept[gradients] = peak_mib(forward, "cpu")
        peaks[gradients] = peak_mib(both, "cpu")
    # the forward is a loss alone, of the workspace's size
    assert kept[RECOMPUTE] <= 1.02 * workspace_mb
    assert kept[FORWARD] > of_gradients
    # the sum of a half-precision dweight in fp32 is beside either, and waits in fp16 for the
    # backward in one of them
    assert peaks[RECOMPUTE] <= peaks[FORWARD] + 0.02


def _teachers(n, v):
    inputs = linear_inputs(n, v)
    logits = inputs.teacher_hidden @ inputs.teacher_weight.T
    top = logits.log_softmax(-1).topk(7)
    stored = QuantizedWeight((inputs.teacher_weight * 16).to(torch.int8), lambda rows: rows / 16)
    heads = [
        TeacherHead(inputs.teacher_hidden, inputs.teacher_weight),
        TeacherHead(inputs.teacher_hidden, stored),
    ]
    return {
        "top-k": TeacherTopK(top.indices, top.values),
        "mixture": TeacherMixture(heads),
        "losses": TeacherMixture(heads, [0.3, 0.9], of="losses"),
    }


@pytest.mark.parametrize("teacher", ["top-k", "mixture", "losses"])
def test_other_heads_and_teachers(teacher):
    inputs = linear_inputs(20, 90)
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(s, generator=generator).requires_grad_() for s in ((3, 24), (90, 3)))
    head = LoraWeight(inputs.student_weight.detach(), a, b, 0.5)
    runs = []
    for gradients in (FORWARD, RECOMPUTE):
        teachers = _teachers(20, 90)  # nobody else holds the stored weight
        loss = linear_kd_loss(inputs.student_hidden, head, teachers[teacher], gradients=gradients)
        del teachers
        runs.append(torch.autograd.grad(loss, (inputs.student_hidden, a, b)))
    for one, other in zip(*runs, strict=True):
        assert one.abs().max() > 0
        assert torch.equal(one, other)


def test_cross_entropy_alone():
    inputs = linear_inputs(20, 90, labels=True, bias=True)
    head = (inputs.student_hidden, inputs.student_weight, inputs.labels)
    runs = []
    for gradients in (FORWARD, RECOMPUTE):
        losses = []

        def forward(gradients=gradients, losses=losses):
            losses.append(
                linear_cross_entropy(*head, bias=inputs.student_bias, gradients=gradients)
            )

        assert len(gemms(forward)) == {FORWARD: 3, RECOMPUTE: 1}[gradients]
        runs.append(grads_of(losses[0], inputs))
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one, other)


def test_compiled_equals_eager():
    inputs = linear_inputs(10, 100, labels=True)
    torch.compiler.reset()
    compiled = torch.compile(loss_of, backend="aot_eager", fullgraph=True)
    losses = [function(inputs, gradients=RECOMPUTE) for function in (compiled, loss_of)]
    for one, other in zip(*[grads_of(loss, inputs) for loss in losses], strict=True):
        assert torch.equal(one, other)


def test_a_weight_that_changes_before_the_backward_is_refused():
    inputs = linear_inputs(4, 9, labels=True)
    loss = loss_of(inputs, gradients=RECOMPUTE)
    with torch.no_grad():
        inputs.student_weight.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()

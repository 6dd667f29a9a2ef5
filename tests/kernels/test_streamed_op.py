"""Ops made from one description, specs that cross their boundary, and heads of other kinds."""

import dataclasses
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from modxfer_fast import linear_kd_loss, linear_kd_loss_terms
from modxfer_fast.kernels.common import KDSpec, packing
from modxfer_fast.kernels.common.head import Head, HeadGradient
from modxfer_fast.kernels.common.rows import Launch, Tokens
from modxfer_fast.kernels.common.spec import Spec
from modxfer_fast.kernels.common.streamed_op import StreamedOp
from modxfer_fast.kernels.linear_kd_loss.op import loss_of_heads, streamed


class Inputs(NamedTuple):
    x: Tensor
    bias: Tensor | None
    row_weights: Tensor
    power: int


def _run(inputs, needs):
    """Rows of w (sum(x + bias))^power."""
    x, bias, weights, power = inputs.x, inputs.bias, inputs.row_weights, inputs.power
    sums = (x if bias is None else x + bias).sum(1)
    slope = (weights * power * sums ** (power - 1))[:, None].expand_as(x).contiguous()
    return (
        weights * sums**power,
        (sums,),
        {"x": slope if needs.x else None, "bias": slope.sum(0) if needs.bias else None},
    )


OP = StreamedOp("streamed_op_test", Inputs, run=_run, gradients=("x", "bias"), terms=("sums",))


def _inputs(**changes):
    generator = torch.Generator().manual_seed(0)
    return Inputs(
        torch.randn(4, 3, generator=generator).requires_grad_(),
        torch.randn(3, generator=generator).requires_grad_(),
        torch.tensor([0.5, 2.0, 0.0, 1.0]),
        2,
    )._replace(**changes)


def _expected(inputs):
    sums = (inputs.x if inputs.bias is None else inputs.x + inputs.bias).sum(1)
    return inputs.row_weights * sums**inputs.power


def test_the_schema_has_the_fields_by_name():
    fwd, rows = torch.ops.modxfer.streamed_op_test_fwd, torch.ops.modxfer.streamed_op_test_rows
    fields = "(Tensor x, Tensor? bias, Tensor row_weights, int power"
    assert str(fwd.default._schema).endswith(
        f"{fields}, bool[] needs) -> (Tensor loss, Tensor sums, Tensor dx, Tensor dbias)"
    )
    assert str(rows.default._schema).endswith(f"{fields}) -> (Tensor rows, Tensor sums)")


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("frozen", [None, "x", "bias"])
def test_gradients_by_name(frozen, reduction):
    inputs = _inputs()
    trained = {name: getattr(inputs, name) for name in ("x", "bias") if name != frozen}
    if frozen is not None:
        inputs = inputs._replace(**{frozen: getattr(inputs, frozen).detach()})
    loss, sums = OP(inputs, reduction)
    expected = _expected(inputs) if reduction == "none" else _expected(inputs).sum()
    torch.testing.assert_close(loss, expected)
    assert not sums.requires_grad
    upstream = torch.randn(loss.shape, generator=torch.Generator().manual_seed(1))
    got = torch.autograd.grad(loss, trained.values(), upstream)
    wanted = torch.autograd.grad(expected, trained.values(), upstream)
    for name, one, other in zip(trained, got, wanted, strict=True):
        torch.testing.assert_close(one, other, msg=name)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_an_absent_input_and_a_row_without_weight(reduction):
    inputs = _inputs(bias=None)
    loss, _ = OP(inputs, reduction)
    upstream = torch.tensor([1.0, 1.0, float("inf"), 1.0]) if reduction == "none" else None
    (dx,) = torch.autograd.grad(loss, inputs.x, upstream)
    assert dx.isfinite().all()
    assert dx[2].eq(0).all()


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_double_backward_is_refused_in_the_name_of_the_loss(reduction):
    inputs = _inputs()
    loss = OP(inputs, reduction)[0].sum()
    with pytest.raises(RuntimeError, match=r"^streamed_op_test: expected a backward without"):
        torch.autograd.grad(loss, inputs.x, create_graph=True)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_opcheck(reduction):
    if reduction == "none":
        torch.library.opcheck(torch.ops.modxfer.streamed_op_test_rows.default, _inputs())
    else:
        args = (*_inputs(), [True, True])
        torch.library.opcheck(torch.ops.modxfer.streamed_op_test_fwd.default, args)


# --- specs


def test_a_spec_crosses_a_boundary():
    spec = KDSpec("jsd", 0.3, 2.0, 0.7, 0.4, alpha=0.0)
    assert KDSpec.read(spec.names(), spec.numbers()) == spec
    assert spec.names() == "jsd"  # no number: one in the string would be compiled anew


def test_a_checked_spec_has_everything_folded_in():
    spec = KDSpec("jsd", 1.0, 3.0, 0.5, scale_by_temperature_squared=True)
    assert spec.checked() == KDSpec("reverse_kl", 1.0, 3.0, 4.5, alpha=0.0)
    assert dataclasses.replace(spec, beta=None).checked().beta == 0.5


def test_a_spec_has_its_strings_first():
    with pytest.raises(TypeError, match="expected fields of str, then of float"):
        type("Wrong", (Spec,), {"__annotations__": {"eps": float, "norm": str}})


# --- a teacher of another kind: what its one file would hold


class Logits(NamedTuple):
    """A teacher whose logits [N, V] are there already."""

    values: Tensor

    row_kernel = property(lambda self: "kd_loss")
    num_buffers = property(lambda self: 0)

    @property
    def vocab_size(self) -> int:
        return self.values.shape[-1]

    def cast(self):
        return self

    def detach(self):
        return Logits(self.values.detach())

    def check(self, role):
        assert role == "teacher"

    def check_teacher(self, student):
        if self.values.shape != (*student.hidden.shape[:-1], student.vocab_size):
            raise ValueError(f"teacher_values: expected [N, V], got {tuple(self.values.shape)}")

    def flat(self, rows):
        return Logits(self.values.reshape(rows, self.vocab_size))

    def take(self, span, index):
        return Logits(packing.take(self.values, span, index))

    def signal(self, buffers, tile, spec):
        assert not buffers
        return self.values

    def row_bytes(self):
        return self.vocab_size * self.values.itemsize

    def widened_bytes(self, dtype):
        return 0


streamed("linear_kd_loss_of_logits_test", Head, Logits)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("labelled", [False, True])
def test_a_teacher_of_another_kind(labelled, reduction):
    generator = torch.Generator().manual_seed(0)
    shapes = ((40, 8), (11, 8), (40, 5), (11, 5))
    hidden, weight, h_t, w_t = (torch.randn(s, generator=generator) for s in shapes)
    labels = torch.arange(40) % 11 if labelled else None
    if labelled:
        labels[::3] = -100
    grads = []
    for teacher in (None, Logits(h_t @ w_t.T)):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        options = {"labels": labels, "reduction": reduction}
        if teacher is None:
            loss = linear_kd_loss(h, w, h_t, w_t, divergence="jsd", backend="reference", **options)
        else:
            loss = loss_of_heads(
                *(Head(h, w), teacher, KDSpec("jsd"), Tokens(**options), Launch(1, "reference"))
            ).loss
            options |= {"divergence": "jsd", "workspace_mb": 1, "backend": "reference"}
            assert torch.equal(loss, linear_kd_loss(h, w, teacher, **options))
            assert torch.equal(loss, linear_kd_loss_terms(h, w, teacher, **options).loss)
        grads.append(torch.autograd.grad(loss.sum(), (h, w)))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


class Unbiased(NamedTuple):
    """A student's head of two tensors, which leaves its work to a `Head`."""

    hidden: Tensor
    weight: Tensor

    vocab_size = property(lambda self: self.weight.shape[0])
    columns = property(lambda self: Head(*self).columns)
    rounds_single = property(lambda self: Head(*self).rounds_single)

    def cast(self):
        return Unbiased(*Head(*self).cast()[:2])

    def check(self, role):
        Head(*self).check(role)

    def flat(self, rows):
        return Unbiased(*Head(*self).flat(rows)[:2])

    def take(self, span, index):
        return Unbiased(*Head(*self).take(span, index)[:2])

    def logits(self, out, tile):
        return Head(*self).logits(out, tile)

    def dlogits(self, logits):
        return Head(*self).dlogits(logits)

    def gradient(self, wanted, row_weights, plan, *, is_packed):
        return Cut(Head(*self).gradient(wanted, row_weights, plan, is_packed=is_packed))

    def row_bytes(self):
        return Head(*self).row_bytes()

    def widened_bytes(self, dtype):
        return Head(*self).widened_bytes(dtype)

    def sum_bytes(self, wanted, dtype):
        return Head(*self).sum_bytes(wanted, dtype)


class Cut(NamedTuple):
    whole: HeadGradient

    def add(self, dlogits, rows, span, index):
        self.whole.add(dlogits, Head(*rows), span, index)

    def result(self):
        return self.whole.result()


streamed("linear_kd_loss_of_unbiased_test", Unbiased, Head)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_head_of_another_kind(reduction):
    generator = torch.Generator().manual_seed(0)
    shapes = ((40, 8), (11, 8), (40, 5), (11, 5))
    hidden, weight, h_t, w_t = (torch.randn(s, generator=generator) for s in shapes)
    grads = []
    for kind in (Head, Unbiased):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        terms = loss_of_heads(
            *(kind(h, w), Head(h_t, w_t), KDSpec("jsd"), Tokens(reduction=reduction)),
            Launch(1, "reference"),
        )
        grads.append(torch.autograd.grad(terms.loss.sum(), (h, w)))
    for one, other in zip(*grads, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("beside", [{"teacher_weight": 1}, {"teacher_bias": 1}])
def test_a_teacher_of_another_kind_has_no_weight_beside_it(beside):
    beside = {name: torch.ones(5, 3) for name in beside}
    teacher = Logits(torch.ones(2, 5))
    with pytest.raises(ValueError, match=r"expected None beside a Logits, .* got a Tensor"):
        linear_kd_loss(torch.ones(2, 3), torch.ones(5, 3), teacher, **beside)


def test_hidden_states_have_a_weight_beside_them():
    with pytest.raises(ValueError, match=r"teacher_weight: expected \[V, D_t\] .* got None"):
        linear_kd_loss(torch.ones(2, 3), torch.ones(5, 3), torch.ones(2, 3))


def test_a_teacher_of_another_kind_is_checked():
    with pytest.raises(ValueError, match="teacher_values"):
        loss_of_heads(
            Head(torch.ones(2, 3), torch.ones(5, 3)),
            *(Logits(torch.ones(2, 4)), KDSpec(), Tokens(), Launch()),
        )

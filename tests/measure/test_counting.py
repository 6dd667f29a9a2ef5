"""What steps keep and launch, where it can be counted by hand."""

import torch

from modxfer_fast import linear_kd_loss
from modxfer_fast.measure import counting


def test_saved_counts_each_storage_once_and_no_weight():
    weight = torch.randn(1024, 256, requires_grad=True)
    x = torch.randn(1024, 1024, requires_grad=True)  # 4 MiB

    def step():
        y = x @ weight  # keeps x and the weight
        (y.exp() * x[:, :256]).sum().backward()  # keeps exp(y), 1 MiB, and a view of x
        x.grad = weight.grad = None

    assert counting.saved_mib(step, [weight]) == 5.0
    assert counting.saved_mib(step, []) == 6.0


def test_saved_sees_what_our_op_keeps():
    n, d, v = 64, 32, 100
    hidden, weight = torch.randn(n, d, requires_grad=True), torch.randn(v, d)
    step = lambda: linear_kd_loss(hidden, weight, hidden.detach(), weight, backend="reference")
    assert counting.saved_mib(step, [weight]) * 2**20 == n * d * 4  # dhidden


def test_launches_are_outermost_calls():
    a, weight = torch.randn(8, 8), torch.randn(8, 8)
    step = lambda: torch.nn.functional.linear(a, weight).relu()  # linear calls t and mm
    assert counting.launches(step, "cpu") == 2
    kd = lambda: linear_kd_loss(a, weight, a, weight, backend="reference")
    assert 0 < counting.launches(kd, "cpu") < 20


def test_launches_of_a_compiled_function_are_unknown_on_a_cpu():
    a = torch.randn(8, 8)
    compiled = torch.compile(lambda x: x.exp() + 1, backend="eager")
    compiled(a)
    assert counting.launches(lambda: compiled(a), "cpu") is None


def test_gemms_are_the_products_of_forward_and_backward():
    x, weight = torch.randn(4, 8), torch.randn(3, 8, requires_grad=True)
    step = lambda: torch.nn.functional.linear(x, weight).relu().sum().backward()
    assert counting.gemms(step) == 2  # x has no gradient

"""linear_cross_entropy and by-products on a GPU: against fp64, bits, and that nothing waits."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from modxfer_fast import (
    TeacherTopK,
    linear_cross_entropy,
    linear_kd_loss_terms,
    linear_log_probs_terms,
)
from tests.gpu import backend_on, no_waiting
from tests.inputs import DTYPES, linear_inputs, masked_labels

pytestmark = pytest.mark.first
# rows, vocabulary, width; and MiB of workspace for a few chunks
SIZES = {"cpu": (50, 2001, 24), "cuda": (1000, 32003, 512)}
CHUNKS = {"cpu": 1, "cuda": 64}


def make(device: str, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Hidden states, head and bias on the device, and labels, every fourth ignored."""
    n, vocab_size, width = SIZES[device]
    made = linear_inputs(n, vocab_size, dtype, d_s=width, bias=True)
    leaves = [
        t.detach().to(device).requires_grad_()
        for t in (made.student_hidden, made.student_weight, made.student_bias)
    ]
    return leaves, masked_labels(n, vocab_size).to(device)


@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_loss_and_gradients(dtype, reduction, softcap, device):
    (hidden, weight, bias), labels = leaves, labels = make(device, dtype)
    options = {"label_smoothing": 0.1, "z_loss_weight": 1e-3, "softcap": softcap}
    options |= {"reduction": reduction, "workspace_mb": CHUNKS[device]}
    runs = []
    for _ in range(2):
        loss = linear_cross_entropy(
            *(hidden, weight, labels), bias=bias, backend=backend_on(device), **options
        )
        upstream = torch.linspace(0.5, 2.0, loss.numel(), device=device).reshape(loss.shape)
        runs.append((loss.detach(), *torch.autograd.grad(loss, leaves, upstream)))
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one, other)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    z = F.linear(*wide)
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    rows = F.cross_entropy(z, labels, reduction="none", label_smoothing=0.1)
    rows = torch.where(labels != -100, rows + 1e-3 * z.logsumexp(-1).square(), 0.0)
    truth = rows if reduction == "none" else rows.sum() / (labels != -100).sum()
    torch.testing.assert_close(runs[0][0].double(), truth, rtol=1e-5, atol=1e-5)
    wanted = torch.autograd.grad(truth, wide, upstream.double())
    for grad, want in zip(runs[0][1:], wanted, strict=True):
        assert (grad.double() - want).norm() <= (2e-5 + torch.finfo(dtype).eps) * want.norm()


@pytest.mark.parametrize("teacher", ["none", "head", "listed"])
def test_by_products_wait_for_nothing(teacher, device):
    (hidden, weight, bias), labels = make(device, torch.bfloat16)
    # of a head it cannot be told from the student's
    teachers = {"head": (hidden.detach(), weight.detach())}
    log_p, ids = F.linear(hidden.detach().float(), weight.detach().float()).topk(8)
    teachers["listed"] = (TeacherTopK(ids, log_p - 99.0),)
    options = {"backend": backend_on(device), "workspace_mb": CHUNKS[device]}

    def run():
        if teacher == "none":
            return linear_log_probs_terms(hidden, weight, labels, bias=bias, **options)
        terms = linear_kd_loss_terms(
            *(hidden, weight, *teachers[teacher]),
            student_bias=bias,
            teacher_bias=bias.detach() if teacher == "head" else None,
            labels=labels,
            ce_weight=0.5,
            by_products=True,
            **options,
        )
        terms.loss.backward()
        return terms.by_products

    run()  # compiles
    with no_waiting(device):
        found = run()
    counts, z = labels != -100, F.linear(hidden.double(), weight.double(), bias.double())
    entropy = -(z.softmax(-1) * z.log_softmax(-1)).sum(-1) * counts
    got = found.entropy if teacher == "none" else found.student_entropy
    torch.testing.assert_close(got.double(), entropy.detach(), rtol=1e-4, atol=1e-4)
    if teacher == "head":
        assert torch.equal(found.agreement, counts.float())
        torch.testing.assert_close(found.student_entropy, found.teacher_entropy)

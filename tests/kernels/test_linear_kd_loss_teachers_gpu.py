"""Teachers and heads of other kinds on a GPU, and how gradients are made there, against fp64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from modxfer_fast import (
    TeacherHead,
    TeacherLogits,
    TeacherLogProbs,
    TeacherMixture,
    TeacherProbs,
    TeacherTopK,
    linear_kd_loss,
)
from modxfer_fast.kernels.linear_kd_loss import LoraWeight, QuantizedWeight
from tests.gpu import backend_on
from tests.inputs import linear_inputs, masked_labels

pytestmark = pytest.mark.first
# rows, vocabulary, width; and MiB of workspace for a few chunks
SIZES = {"cpu": (40, 1501, 16), "cuda": (1000, 32003, 512)}
CHUNKS = {"cpu": 1, "cuda": 64}
CAP = 30.0


def make(device: str) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Student and teacher of bf16 on the device, and labels, every fourth ignored."""
    n, vocab_size, width = SIZES[device]
    made = linear_inputs(n, vocab_size, torch.bfloat16, d_s=width, d_t=width // 2)
    on = {name: t.detach().to(device) for name, t in made.tensors().items() if t is not None}
    student = {name: on[f"student_{name}"].requires_grad_() for name in ("hidden", "weight")}
    teacher = {name: on[f"teacher_{name}"] for name in ("hidden", "weight")}
    return student, teacher, masked_labels(n, vocab_size).to(device)


def teachers(teacher: dict[str, Tensor]) -> dict[str, tuple[object, Tensor]]:
    """By name, what is given and its log-probabilities [N, V] in fp64."""
    hidden, weight = teacher["hidden"], teacher["weight"]
    z = F.linear(hidden.double(), weight.double())
    log_p, n = z.float().log_softmax(-1), len(hidden)
    capped = CAP * torch.tanh(0.5 * z / CAP)
    listed = log_p.topk(64)
    renormalised = torch.full_like(z, -torch.inf).scatter(1, listed.indices, listed.values.double())
    stored = QuantizedWeight((8 * weight).to(torch.int8), lambda rows: rows.bfloat16() / 8)
    of_stored = F.linear(hidden.double(), (8 * weight).to(torch.int8).double() / 8)
    heads = [TeacherHead(hidden, weight), TeacherHead(hidden, weight, None, 0.5, CAP)]
    halves = torch.stack([z.log_softmax(-1), capped.log_softmax(-1)]).logsumexp(0)
    route = torch.arange(n, device=z.device) % 2
    return {
        "logits": (TeacherLogits(z.float()), z),
        "log-probs": (TeacherLogProbs(log_p), z),
        "probs": (TeacherProbs(log_p.exp()), log_p.exp().double().log()),
        "listed": (TeacherTopK(*listed[::-1], "renormalise"), renormalised),
        "stored": (TeacherMixture([TeacherHead(hidden, stored)]), of_stored),
        "mixture": (TeacherMixture(heads), halves),
        "route": (TeacherMixture(heads, route=route), torch.where(route[:, None] == 0, z, capped)),
    }


def check(loss: Tensor, leaves: list[Tensor], truth: Tensor, wide: list[Tensor]) -> None:
    torch.testing.assert_close(loss.detach().double(), truth.detach(), rtol=1e-4, atol=1e-4)
    wanted = torch.autograd.grad(truth, wide)
    for grad, want in zip(torch.autograd.grad(loss, leaves), wanted, strict=True):
        assert (grad.double() - want).norm() <= 5e-3 * want.norm()


def truth_of(z_s: Tensor, log_p: Tensor, labels: Tensor) -> Tensor:
    p, counts = log_p.softmax(-1), labels != -100
    d = log_p.log_softmax(-1) - z_s.log_softmax(-1)
    kd = (p * d.masked_fill(p == 0, 0.0)).sum(-1)[counts].mean()
    return kd + 0.4 * F.cross_entropy(z_s, labels)


@pytest.mark.parametrize("gradients", ["forward", "recompute"])
@pytest.mark.parametrize(
    "name", ["logits", "log-probs", "probs", "listed", "stored", "mixture", "route"]
)
def test_teachers(name, gradients, device):
    student, teacher, labels = make(device)
    given, log_p = teachers(teacher)[name]
    options = {"workspace_mb": CHUNKS[device], "backend": backend_on(device)}
    loss = linear_kd_loss(
        *(*student.values(), given),
        labels=labels,
        ce_weight=0.4,
        student_softcap=CAP,
        gradients=gradients,
        **options,
    )
    wide = [t.detach().double().requires_grad_() for t in student.values()]
    z_s = CAP * torch.tanh(F.linear(*wide) / CAP)
    check(loss, list(student.values()), truth_of(z_s, log_p, labels), wide)


@pytest.mark.parametrize("filter_eps", [None, 1e-9])
def test_a_lora_beside_the_head(filter_eps, device):
    student, teacher, labels = make(device)
    hidden, weight = student["hidden"], student["weight"].detach()
    a, b = (
        (0.1 * torch.randn(s, generator=torch.Generator().manual_seed(i))).bfloat16().to(device)
        for i, s in enumerate(((4, weight.shape[1]), (len(weight), 4)))
    )
    leaves = [hidden, a.requires_grad_(), b.requires_grad_()]
    loss = linear_kd_loss(
        *(hidden, LoraWeight(weight, a, b, 0.5), teacher["hidden"], teacher["weight"]),
        labels=labels,
        ce_weight=0.4,
        filter_eps=filter_eps,
        workspace_mb=CHUNKS[device],
        backend=backend_on(device),
    )
    wide = [t.detach().double().requires_grad_() for t in leaves]
    z_s = F.linear(wide[0], weight.double() + 0.5 * wide[2] @ wide[1])
    z_t = F.linear(teacher["hidden"].double(), teacher["weight"].double())
    check(loss, leaves, truth_of(z_s, z_t, labels), wide)

"""Label smoothing and z-loss of capped logits, beside one teacher and a sum over several."""

import pytest
import torch
import torch.nn.functional as F

from modxfer_fast import TeacherLogits, TeacherMixture, linear_kd_loss_terms
from tests.inputs import BACKENDS, close_logits, linear_inputs

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("of_losses", [False, True], ids=["one teacher", "sum of losses"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_of_bent_logits_and_once_for_all_teachers(backend, of_losses):
    inputs = linear_inputs(9, 130, bias=False, labels=True)
    leaves = inputs.trainable()
    teachers, shares = [close_logits(9, 130, seed=i)[1] for i in range(3)], [0.2, 0.3, 0.5]
    of_one = TeacherLogits(teachers[0])
    mixture = TeacherMixture([TeacherLogits(each) for each in teachers], shares, of="losses")
    terms = linear_kd_loss_terms(
        *(inputs.student_hidden, inputs.student_weight, mixture if of_losses else of_one),
        labels=inputs.labels,
        temperature=2.0,
        kd_weight=0.7,
        ce_weight=0.4,
        label_smoothing=0.1,
        z_loss_weight=1e-2,
        student_logit_scale=1.5,
        student_softcap=5.0,
        backend=backend,
        by_products=not of_losses,
    )
    wide = {name: t.detach().double().requires_grad_() for name, t in leaves.items()}
    z = 5.0 * torch.tanh(0.3 * wide["student_hidden"] @ wide["student_weight"].T)
    log_q, counts = (z / 2.0).log_softmax(-1), inputs.labels != -100
    kd = torch.zeros(9, dtype=torch.float64)
    for share, logits in zip(shares if of_losses else [1.0], teachers, strict=False):
        log_p = (logits.double() / 2.0).log_softmax(-1)
        kd = kd + share * (log_p.exp() * (log_p - log_q)).sum(-1)
    ce = F.cross_entropy(z, inputs.labels, reduction="none", label_smoothing=0.1)
    rows = 0.7 * kd + 0.4 * ce + 1e-2 * z.logsumexp(-1).square()
    truth = rows[counts].mean()
    torch.testing.assert_close(terms.loss.double(), truth, rtol=1e-5, atol=1e-5)
    for got, want in zip(
        torch.autograd.grad(terms.loss, list(leaves.values())),
        torch.autograd.grad(truth, list(wide.values())),
        strict=True,
    ):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-6)
    if not of_losses:
        of_label = z.log_softmax(-1).gather(1, inputs.labels.clamp(min=0)[:, None])[:, 0]
        got = terms.by_products.label_log_prob.double()
        torch.testing.assert_close(got, (of_label * counts).detach(), rtol=1e-5, atol=1e-5)

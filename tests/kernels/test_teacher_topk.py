"""teacher_topk: ids, log-probabilities and the mass of the rest, against definitions in fp64."""

import math

import pytest
import torch
from torch import Tensor

from modxfer_fast import (
    BackendError,
    TeacherLogits,
    TeacherLogProbs,
    TeacherMixture,
    TeacherProbs,
    TeacherTopK,
    kd_loss,
    linear_kd_loss,
    teacher_topk,
)
from modxfer_fast.kernels import dispatch
from modxfer_fast.kernels.common import KDSpec, scratch
from tests.inputs import BACKENDS, DTYPES, NATIVE
from tests.kernels.test_cross_entropy_heads import BENDS, HEADS, Head, bent
from tests.support.topk_rows import (
    assert_finds,
    assert_is_broken,
    broken_rows,
    fields,
    hard_rows,
    randn,
    truth_of,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def of_logits(logits: Tensor, k: int, **options) -> TeacherTopK:
    return teacher_topk(TeacherLogits(logits), k=k, **options)


@pytest.mark.pairs
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("bend", BENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", HEADS)
def test_every_head(kind, dtype, bend, temperature, backend):
    head, (scale, cap), k = Head(kind, dtype), BENDS[bend], 9
    found = teacher_topk(
        *(head.leaves["hidden"], head.weight),
        k=k,
        temperature=temperature,
        teacher_bias=head.leaves.get("bias"),
        teacher_logit_scale=scale,
        teacher_softcap=cap,
        backend=backend,
    )
    assert found.tail == "bucket"
    assert found.temperature == temperature
    ids, log_probs, log_tail = fields(found)
    assert not log_probs.requires_grad
    wide = {name: leaf.detach().double() for name, leaf in head.leaves.items()}
    log_p = (bent(head.logits(wide), scale, cap) / temperature).log_softmax(-1)
    # a product in fp32 may swap two classes, not what they have
    torch.testing.assert_close(log_probs.double(), log_p.topk(k).values, rtol=0.0, atol=5e-6)
    torch.testing.assert_close(log_probs.double(), log_p.gather(1, ids.long()), rtol=0.0, atol=5e-6)
    tail = log_p.scatter(1, ids.long(), -torch.inf).logsumexp(-1)
    torch.testing.assert_close(log_tail.double(), tail, rtol=0.0, atol=5e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("classes", "k"),
    [(2, 1), (67, 1), (67, 5), (67, 67), (1043, 3), (1043, 64), (1043, 700), (1043, 1043)],
)
def test_the_order_is_exact(classes, k, backend):
    """Of equal logits the lower ids come first; of few that are there, the others are absent."""
    rows = hard_rows(classes)
    assert_finds(of_logits(rows, k, backend=backend), rows, k)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_half_precision(dtype, backend):
    rows = (2.0 * randn(5, 1043, seed=1)).to(dtype)[:, 3:]  # of which many are equal
    assert_finds(of_logits(rows, 100, backend=backend), rows, 100)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_without_a_softmax(backend):
    assert_is_broken(of_logits(broken_rows(300), 7, backend=backend), 7)


@pytest.mark.parametrize("backend", NATIVE)
def test_given_probabilities(backend):
    log_p = randn(4, 50).double().log_softmax(-1)
    for teacher in (TeacherLogProbs(log_p.float()), TeacherProbs(log_p.exp().float())):
        ids, log_probs, log_tail = fields(teacher_topk(teacher, k=6, backend=backend))
        of_ids, of_probs, of_tail = truth_of(log_p, 6)
        assert torch.equal(ids, of_ids)
        torch.testing.assert_close(log_probs.double(), of_probs, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(log_tail.double(), of_tail, rtol=1e-6, atol=1e-6)


def test_fp64_stays_fp64():
    rows = 30.0 * randn(3, 200).double()
    found = fields(of_logits(rows, 4))
    assert found[1].dtype == found[2].dtype == torch.float64
    for got, want in zip(found[1:], truth_of(rows, 4)[1:], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("backend", NATIVE)
def test_shapes_chunks_and_no_rows(backend):
    hidden, weight = randn(2, 50, 8), randn(3000, 8, seed=2)
    whole = fields(teacher_topk(hidden, weight, k=5, backend=backend))
    assert [tuple(field.shape) for field in whole] == [(2, 50, 5), (2, 50, 5), (2, 50)]
    chunks = fields(teacher_topk(hidden, weight, k=5, workspace_mb=1, backend=backend))
    assert torch.equal(whole[0], chunks[0])
    torch.testing.assert_close(whole[1], chunks[1], rtol=0.0, atol=1e-5)
    one = fields(teacher_topk(hidden[0, 0], weight, k=5, backend=backend))
    assert torch.equal(one[0], whole[0][0, 0])
    assert one[2].shape == ()
    none = fields(teacher_topk(hidden[:, :0], weight, k=5, backend=backend))
    assert [tuple(field.shape) for field in none] == [(2, 0, 5), (2, 0, 5), (2, 0)]


@pytest.mark.parametrize("backend", NATIVE)
def test_logits_exist_for_one_chunk_of_rows(backend, monkeypatch):
    rows, kernels = [], dispatch.load("kd_loss", backend)
    run = kernels.teacher_topk

    def counted(logits, *args):
        rows.append(len(logits))
        return run(logits, *args)

    monkeypatch.setattr(kernels, "teacher_topk", counted)
    scratch.release_workspace()
    teacher_topk(randn(100, 8), randn(3000, 8), k=5, workspace_mb=1, backend=backend)
    assert sum(rows) == 100
    assert max(rows) * scratch.pitch(3000) * 4 <= 2**20


def test_under_autocast():
    hidden, weight = randn(5, 16), randn(70, 16, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        found = fields(teacher_topk(hidden, weight, k=4))
    plain = fields(teacher_topk(hidden.bfloat16(), weight.bfloat16(), k=4))
    assert all(map(torch.equal, found, plain))


def test_the_op_is_as_its_fake_says():
    op = torch.ops.modxfer.teacher_topk_of_values.default
    spec = KDSpec(temperature=2.0).checked()
    arguments = (randn(4, 30), "logits", None, 3, spec.numbers(), spec.names(), None, "cpp")
    torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


def test_compiled_whole_and_once_for_all_temperatures():
    hidden, weight = randn(5, 8), randn(40, 8, seed=1)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    def run(hidden, weight, temperature):
        return fields(teacher_topk(hidden, weight, k=4, temperature=temperature))

    compiled = torch.compile(run, fullgraph=True, backend=count)
    for temperature in (1.5, 2.5, 3.5):
        found, plain = (each(hidden, weight, temperature) for each in (compiled, run))
        assert all(map(torch.equal, found, plain))
    assert len(graphs) == 2  # one that knows the temperature, then one for all


# --- as a teacher


def dense(student: Tensor, logits: Tensor, k: int, temperature: float) -> Tensor:
    """Forward KL of the k largest classes and of the rest as one more, in fp64."""
    ids, log_p, log_tail = truth_of(logits, k, temperature=temperature)
    log_q = (student.double() / temperature).log_softmax(-1)
    others = log_q.scatter(1, ids.long(), -torch.inf).logsumexp(-1)
    listed = log_p.exp() * (log_p - log_q.gather(1, ids.long()))
    return listed.sum(-1) + log_tail.exp() * (log_tail - others)


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_teaches_as_it_is(temperature, backend):
    student, logits = randn(6, 90), 3.0 * randn(6, 90, seed=1)
    cached = teacher_topk(TeacherLogits(logits), k=8, temperature=temperature, backend=backend)
    loss = kd_loss(student, cached, temperature=temperature, reduction="none", backend=backend)
    truth = dense(student, logits, 8, temperature)
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-6)
    hidden = torch.eye(6)
    of_head = linear_kd_loss(
        *(hidden, student.T.contiguous(), cached),
        temperature=temperature,
        reduction="none",
        backend=backend,
    )
    torch.testing.assert_close(of_head.double(), truth, rtol=1e-5, atol=1e-6)
    again = TeacherTopK(*cached)  # what a cache gives back
    options = {"temperature": temperature, "reduction": "none", "backend": backend}
    assert torch.equal(kd_loss(student, again, **options), loss)


@pytest.mark.parametrize("backend", NATIVE)
def test_the_mass_of_the_rest_is_as_exact_where_there_is_next_to_none(backend):
    """1 - sum p of fp32 would be rounding, of log-probabilities in half precision more so."""
    student, logits = randn(4, 60), randn(4, 60, seed=1)
    logits[:, 5] += 35.0
    cached = teacher_topk(TeacherLogits(logits), k=1, backend=backend)
    _, log_p, log_tail = truth_of(logits, 1)
    log_q = student.double().log_softmax(-1)
    others = torch.cat([log_q[:, :5], log_q[:, 6:]], 1).logsumexp(-1)
    reverse_kl = log_q[:, 5].exp() * (log_q[:, 5] - log_p[:, 0]) + others.exp() * (
        others - log_tail
    )
    for teacher in (cached, cached._replace(log_probs=cached.log_probs.half())):
        loss = kd_loss(student, teacher, divergence="reverse_kl", reduction="none", backend=backend)
        torch.testing.assert_close(loss.double(), reverse_kl, rtol=1e-5, atol=1e-9)
    without = cached._replace(log_tail=None)
    loss = kd_loss(student, without, divergence="reverse_kl", reduction="none", backend=backend)
    assert ((loss - reverse_kl).abs() > 0.1 * reverse_kl).all()


def test_a_broken_row_of_the_teacher_is_a_loss_of_nan():
    cached = teacher_topk(TeacherLogits(broken_rows(40)), k=3)
    for tail in ("bucket", "renormalise", "none"):
        loss = kd_loss(randn(4, 40), cached._replace(tail=tail), reduction="none")
        assert loss.isnan().all()


def test_rows_with_fewer_classes_than_k_teach():
    logits = torch.full((2, 30), -torch.inf)
    logits[:, 3:7] = randn(2, 4)
    student = randn(2, 30, seed=1)
    cached = teacher_topk(TeacherLogits(logits), k=6)
    assert (cached.ids[:, 4:] == -1).all()
    loss = kd_loss(student, cached, reduction="none")
    p = logits.double().softmax(-1)[:, 3:7]
    truth = (p * (p.log() - student.double().log_softmax(-1)[:, 3:7])).sum(-1)
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-6)


# --- bad input

HIDDEN, WEIGHT = torch.ones(4, 8), torch.ones(20, 8)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"k": 0}, ValueError, r"k: expected a number in \[1, 20\], of classes, got 0"),
        ({"k": 21}, ValueError, r"k: expected a number in \[1, 20\], of classes, got 21"),
        ({"k": 2.0}, TypeError, r"k: expected an integer, got 2.0"),
        ({"temperature": 0.0}, ValueError, r"temperature: expected a positive number, got 0.0"),
        ({"temperature": torch.ones(4)}, TypeError, r"temperature: expected a number, got a tens"),
        ({"teacher_softcap": -1.0}, ValueError, r"teacher_softcap: expected a positive finite"),
        ({"teacher_weight": None}, ValueError, r"teacher_weight: expected \[V, D_t\] beside"),
        ({"teacher_weight": torch.ones(20, 7)}, ValueError, r"teacher_hidden: expected shape"),
        ({"teacher_bias": torch.ones(19)}, ValueError, r"teacher_bias: expected torch.float32 of"),
        ({"workspace_mb": 0}, ValueError, r"workspace_mb: expected a positive number"),
        ({"backend": "cude"}, ValueError, r"backend: expected one of"),
        ({"backend": "cuda"}, BackendError, r"cuda: "),
        ({"teacher_hidden": [1.0]}, TypeError, r"teacher_hidden: expected a tensor, got list"),
    ],
)
def test_bad_input(options, error, message):
    given = {"teacher_hidden": HIDDEN, "teacher_weight": WEIGHT, "k": 3} | options
    with pytest.raises(error, match=message):
        teacher_topk(**given)


@pytest.mark.parametrize(
    ("teacher", "options", "error", "message"),
    [
        (torch.ones(4, 0), {}, ValueError, r"teacher_logits: expected shape"),
        (
            torch.ones(4, 9),
            {"teacher_softcap": 3.0},
            ValueError,
            r"teacher_softcap: expected 1",
        ),
        (
            torch.ones(4, 9),
            {"teacher_weight": WEIGHT},
            ValueError,
            r"teacher_weight: expected No",
        ),
    ],
)
def test_bad_given_logits(teacher, options, error, message):
    with pytest.raises(error, match=message):
        teacher_topk(TeacherLogits(teacher), **{"k": 3} | options)


def test_teachers_without_one_row_of_values():
    listed = TeacherTopK(torch.zeros(4, 1, dtype=torch.int64), torch.zeros(4, 1))
    for teacher in (listed, TeacherMixture([TeacherLogits(torch.ones(4, 9))])):
        with pytest.raises(TypeError, match=r"teacher_hidden: expected hidden states beside a wh"):
            teacher_topk(teacher, k=1)
    with pytest.raises(ValueError, match=r"teacher_probs: expected values in \[0, 1\], got 2"):
        teacher_topk(TeacherProbs(torch.full((1, 3), 2.0)), k=1)


@pytest.mark.parametrize(
    ("log_tail", "error", "message"),
    [
        (torch.zeros(3), ValueError, r"teacher_log_tail: expected shape \(4,\), the leading"),
        (torch.zeros(4, dtype=torch.int64), TypeError, r"teacher_log_tail: expected a floating"),
        (
            torch.zeros(4),
            ValueError,
            r"sum with the mass of log_tail is at most 1 .* got 1.5",
        ),
        (torch.zeros(4).requires_grad_(), ValueError, r"teacher_log_tail: expected a constant"),
    ],
)
def test_bad_log_tail(log_tail, error, message):
    half = torch.full((4, 1), math.log(0.5))
    teacher = TeacherTopK(torch.zeros(4, 1, dtype=torch.int64), half, log_tail=log_tail)
    with pytest.raises(error, match=message):
        kd_loss(torch.ones(4, 9), teacher)

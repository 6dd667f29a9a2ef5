"""Heads with a LoRA, quantised heads, tied heads, and vocabularies that differ, against fp64."""

import gc

import pytest
import torch
from torch import Tensor

from modxfer_fast import (
    LinearKDLoss,
    LoraWeight,
    QuantizedWeight,
    TeacherHead,
    TeacherLogits,
    TeacherMixture,
    TeacherProbs,
    TeacherTopK,
    linear_kd_loss,
)
from tests.inputs import BACKENDS, NATIVE
from tests.kernels.test_given_teachers import D, N, V, check, divergence_rows, labels, randn, total

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TEACHER = 2.0 * randn(N, V, seed=4)


def leaves_of(dtype, *names: str, frozen: str = "") -> dict[str, Tensor]:
    made = {
        "student_hidden": randn(N, D, seed=1),
        "student_weight": 0.6 * randn(V, D, seed=2),
        "student_bias": 0.3 * randn(V, seed=3),
        "lora_A": 0.5 * randn(3, D, seed=5),
        "lora_B": 0.5 * randn(V, 3, seed=6),
    }
    return {name: made[name].to(dtype).requires_grad_(name != frozen) for name in names}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("frozen", ["", "student_weight", "lora_A", "student_hidden"])
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
def test_lora(dtype, frozen, backend):
    names = ("student_hidden", "student_weight", "student_bias", "lora_A", "lora_B")
    tensors = leaves_of(dtype, *names, frozen=frozen)
    lora = LoraWeight(*(tensors[name] for name in ("student_weight", "lora_A", "lora_B")), 1.7)
    loss = linear_kd_loss(
        *(tensors["student_hidden"], lora, TeacherLogits(TEACHER)),
        student_bias=tensors["student_bias"],
        labels=labels(),
        ce_weight=0.4,
        backend=backend,
    )

    def truth(z_s):
        rows = divergence_rows(TEACHER.to(z_s.dtype), z_s, "forward_kl", 1.0)
        return total(rows, z_s, 1.0, 0.4, labels())

    trained = {name: t for name, t in tensors.items() if t.requires_grad}
    constants = {name: t.detach() for name, t in tensors.items() if not t.requires_grad}
    check(trained, loss, truth, _lora_logits(1.7, constants))


def _lora_logits(scaling, constants):
    def logits(tensors):
        like = next(iter(tensors.values()))
        given = {name: t.to(like.dtype) for name, t in constants.items()} | tensors
        weight = given["student_weight"] + scaling * given["lora_B"] @ given["lora_A"]
        return given["student_hidden"] @ weight.T + given["student_bias"]

    return logits


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_lora_in_chunks_is_autograd_through_the_whole_weight(reduction):
    h, w = randn(2, 20, 8, seed=1), randn(4000, 8, seed=2)
    a, b, z_t = randn(3, 8, seed=3), randn(4000, 3, seed=4), randn(2, 20, 4000, seed=5)
    target = (torch.arange(40) * 7).reshape(2, 20)
    target[:, ::3] = -100
    results = []
    for is_lora in (True, False):
        leaves = [t.clone().requires_grad_() for t in (h, w, a, b)]
        weight = (
            LoraWeight(*leaves[1:], 0.5) if is_lora else leaves[1] + 0.5 * leaves[3] @ leaves[2]
        )
        loss = linear_kd_loss(
            *(leaves[0], weight, TeacherLogits(z_t)),
            labels=target,
            reduction=reduction,
            workspace_mb=1,
        )
        results.append((loss, *torch.autograd.grad(loss, leaves, randn(*loss.shape, seed=6))))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_lora_of_a_peft_layer():
    peft = pytest.importorskip("peft")
    linear = torch.nn.Sequential(torch.nn.Linear(D, V))
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["0"], init_lora_weights=False)
    model = peft.get_peft_model(linear, config)
    layer = model.base_model.model[0]
    hidden = randn(N, D)
    expected = linear_kd_loss_of_logits(layer(hidden))
    for names in (["default"], ["default", "second"]):
        if "second" in names:
            model.add_adapter("second", config)
            model.base_model.set_adapter(names)
            expected = linear_kd_loss_of_logits(layer(hidden))
        loss = linear_kd_loss(
            *(hidden, LoraWeight.of(layer), TeacherLogits(TEACHER)),
            student_bias=layer.base_layer.bias,
        )
        torch.testing.assert_close(loss, expected)
        parameters = [p for p in layer.parameters() if p.requires_grad]
        for one, other in zip(
            torch.autograd.grad(loss, parameters),
            torch.autograd.grad(expected, parameters),
            strict=True,
        ):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    layer.merge()
    assert LoraWeight.of(layer) is layer.base_layer.weight


def linear_kd_loss_of_logits(logits):
    return divergence_rows(TEACHER, logits, "forward_kl", 1.0).mean()


def test_lora_of_what_has_none():
    with pytest.raises(TypeError, match=r"expected a linear that PEFT .* got a Linear"):
        LoraWeight.of(torch.nn.Linear(2, 3))


def test_a_lora_learns_from_listed_classes():
    tensors = leaves_of(torch.float32, "student_hidden", "student_weight", "lora_A", "lora_B")
    h, w, a, b = tensors.values()
    teacher = TeacherTopK(*reversed(TEACHER.log_softmax(-1).topk(5)))
    results = [
        (loss, *torch.autograd.grad(loss, [h, w, a, b]))
        for loss in (
            linear_kd_loss(h, LoraWeight(w, a, b, 0.5), teacher),
            linear_kd_loss(h, w + 0.5 * b @ a, teacher),
        )
    ]
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


# --- quantised


def int8(weight: Tensor) -> tuple[QuantizedWeight, Tensor]:
    scale = weight.abs().amax(1) / 127
    stored = (weight / scale[:, None]).round().to(torch.int8)
    made = QuantizedWeight(stored, lambda rows, scale: rows * scale[:, None], scale)
    return made, stored * scale[:, None]


def int4(weight: Tensor) -> tuple[QuantizedWeight, Tensor]:
    """Two values a byte, a scale for each group of four."""
    groups = weight.reshape(len(weight), -1, 4)
    scale = groups.abs().amax(-1) / 7
    codes = ((groups / scale[..., None]).round() + 8).reshape(weight.shape).to(torch.uint8)
    stored = codes[:, 0::2] | (codes[:, 1::2] << 4)

    def dequantize(rows, scale):
        values = torch.stack([rows & 15, rows >> 4], -1).flatten(1).float() - 8
        return (values.unflatten(1, (-1, 4)) * scale[..., None]).flatten(1)

    return QuantizedWeight(stored, dequantize, scale), dequantize(stored, scale)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lora", [False, True], ids=["plain", "lora"])
@pytest.mark.parametrize("make", [int8, int4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_quantised(dtype, make, lora, backend):
    """On both sides at once."""
    of_student, dense = make(0.6 * randn(V, D, seed=2))
    of_teacher, teacher_dense = make(randn(V, 8, seed=7))
    h_t = randn(N, 8, seed=8).to(dtype)
    names = ("student_hidden", "student_bias", *(("lora_A", "lora_B") if lora else ()))
    tensors = leaves_of(dtype, *names)
    weight = of_student
    if lora:
        weight = LoraWeight(of_student, tensors["lora_A"], tensors["lora_B"], 0.5)
    loss = linear_kd_loss(
        *(tensors["student_hidden"], weight, h_t, of_teacher),
        student_bias=tensors["student_bias"],
        backend=backend,
    )
    z_t = h_t.double() @ teacher_dense.to(dtype).double().T

    def logits(given):
        wide = dense.to(dtype).to(given["student_hidden"])
        if lora:
            wide = wide + 0.5 * given["lora_B"] @ given["lora_A"]
        return given["student_hidden"] @ wide.T + given["student_bias"]

    def truth(z_s):
        return divergence_rows(z_t.to(z_s.dtype), z_s, "forward_kl", 1.0).mean()

    check(tensors, loss, truth, logits)


def test_a_quantised_weight_lives_until_the_backward():
    h = randn(N, D).requires_grad_()
    rows = linear_kd_loss(h, int8(randn(V, D))[0], TeacherLogits(TEACHER), reduction="none")
    gc.collect()
    rows.sum().backward()
    assert h.grad.isfinite().all()


# --- tied


def test_a_tied_head():
    """Embedding and head are one tensor, and its gradient is the sum of both."""
    tokens = torch.arange(N) * 3
    grads = []
    for is_fused in (True, False):
        weight = (0.5 * randn(V, D, seed=2)).requires_grad_()
        hidden = torch.nn.functional.embedding(tokens, weight).tanh()
        if is_fused:
            loss = linear_kd_loss(hidden, weight, TeacherLogits(TEACHER))
        else:
            loss = linear_kd_loss_of_logits(hidden @ weight.T)
        grads.append(torch.autograd.grad(loss, weight)[0])
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)


# --- vocabularies


def teachers_of(classes: int):
    """Every dense kind of that many classes, with its logits."""
    h_t, w_t, b_t = randn(N, 5, seed=8), randn(classes, 5, seed=9), randn(classes, seed=10)
    stored, dense = int8(randn(classes, D, seed=11))
    h_d = randn(N, D, seed=12)
    logits = 2.0 * randn(N, classes, seed=13)
    of_head = h_t @ w_t.T + b_t
    probs = of_head.softmax(-1)
    return {
        "head": (TeacherHead(h_t, w_t, b_t), of_head),
        "quantised": (TeacherHead(h_d, stored), h_d @ dense.T),
        "logits": (TeacherLogits(logits), logits),
        "probs": (TeacherProbs(probs), probs.log()),
        "mixture": (TeacherMixture([TeacherHead(h_t, w_t, b_t), TeacherProbs(probs)]), of_head),
    }


def students_of(classes: int):
    h, w = randn(N, D, seed=1), 0.6 * randn(classes, D, seed=2)
    a, b = randn(3, D, seed=3), 0.2 * randn(classes, 3, seed=4)
    stored, dense = int8(w)
    return h, {
        "plain": (w, w),
        "lora": (LoraWeight(w, a, b, 0.5), w + 0.5 * b @ a),
        "quantised": (stored, dense),
    }


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("head", ["plain", "lora", "quantised"])
@pytest.mark.parametrize("teacher", ["head", "quantised", "logits", "probs", "mixture"])
@pytest.mark.parametrize("policy", ["student-larger", "teacher-larger", "ids"])
def test_vocabularies(policy, teacher, head, backend):
    classes = {"student-larger": (V, V - 9), "teacher-larger": (V - 9, V), "ids": (V - 9, V)}[
        policy
    ]
    hidden, heads = students_of(classes[0])
    weight, dense = heads[head]
    given, logits = teachers_of(classes[1])[teacher]
    hidden.requires_grad_()
    common = torch.arange(V - 9)
    options = {"vocabulary": "common"}
    if policy == "ids":
        common = torch.randperm(V, generator=torch.Generator().manual_seed(3))[: V - 9]
        options = {"teacher_ids": common}
    target = torch.arange(N) % (V - 9)
    args = (given.hidden, given.weight) if teacher in ("head", "quantised") else (given,)
    if teacher == "head":
        options["teacher_bias"] = given.bias
    loss = linear_kd_loss(
        *(hidden, weight, *args), labels=target, ce_weight=0.4, backend=backend, **options
    )
    z_t = logits.double()[:, common]

    def truth(z_s):
        rows = divergence_rows(z_t.to(z_s.dtype), z_s, "forward_kl", 1.0)
        return total(rows, z_s, 1.0, 0.4, target)

    check(
        {"student_hidden": hidden},
        loss,
        truth,
        lambda t: (t["student_hidden"] @ dense.to(t["student_hidden"]).T)[:, : V - 9],
    )


def test_classes_beside_the_common_ones_have_no_gradient():
    h, w = randn(N, D), randn(V + 4, D).requires_grad_()
    bias = randn(V + 4).requires_grad_()
    options = {"student_bias": bias, "vocabulary": "common"}
    linear_kd_loss(h, w, TeacherLogits(TEACHER), **options).backward()
    assert (w.grad[V:] == 0).all()
    assert (bias.grad[V:] == 0).all()
    assert w.grad[:V].abs().sum() > 0


def test_the_module_has_both_options():
    h, w = randn(N, D), randn(V + 4, D)
    expected = linear_kd_loss(h, w, TeacherLogits(TEACHER), vocabulary="common")
    assert torch.equal(LinearKDLoss(vocabulary="common")(h, w, TeacherLogits(TEACHER)), expected)
    ids = torch.arange(V - 3)
    expected = linear_kd_loss(h, w[: V - 3], TeacherLogits(TEACHER), teacher_ids=ids)
    assert torch.equal(
        LinearKDLoss()(h, w[: V - 3], TeacherLogits(TEACHER), teacher_ids=ids), expected
    )


def call(**changes):
    given = {"student_hidden": randn(N, D), "student_weight": randn(V, D)}
    return linear_kd_loss(**given | {"teacher_hidden": TeacherLogits(TEACHER)} | changes)


def lora(a=(3, D), b=(V, 3), **options):
    return LoraWeight(randn(V, D), torch.ones(a), torch.ones(b), **options)


STORED = torch.zeros(V, D, dtype=torch.int8)
TOP = TEACHER.log_softmax(-1).topk(5)
BAD = {
    "common-topk": (
        {"teacher_hidden": TeacherTopK(TOP.indices, TOP.values), "vocabulary": "common"},
        *(ValueError, "vocabulary: expected a teacher of one value a class, .* TeacherTopK"),
    ),
    "policy": ({"vocabulary": "same"}, ValueError, "vocabulary: .*equal, common, got 'same'"),
    "both": (
        {"vocabulary": "common", "teacher_ids": torch.arange(V)},
        *(ValueError, "vocabulary: expected 'equal' beside teacher_ids"),
    ),
    "ids-dtype": ({"teacher_ids": torch.zeros(V)}, TypeError, "teacher_ids: .*int64.*float32"),
    "ids-shape": ({"teacher_ids": torch.arange(3)}, ValueError, r"teacher_ids: .*\(70,\).*\(3,\)"),
    "ids-value": ({"teacher_ids": torch.arange(V) + 1}, ValueError, r"\[0, 70\).* got 70"),
    "ids-twice": (
        {"teacher_ids": torch.zeros(V, dtype=torch.int64)},
        *(ValueError, "teacher_ids: expected each class of the teacher once"),
    ),
    "unequal": ({"student_weight": randn(V + 1, D)}, ValueError, "teacher_logits: .*71.*70"),
    "labels": (
        {
            "student_weight": randn(V + 4, D),
            "labels": torch.full((N,), V),
            "vocabulary": "common",
        },
        *(ValueError, r"labels: expected values in \[0, 70\)"),
    ),
    "stored": ({"student_weight": STORED}, TypeError, r"int8.*QuantizedWeight\(weight, dequ"),
    "lora-a": ({"student_weight": lora(a=(3, D + 1))}, ValueError, "student_lora_A: .*13"),
    "lora-b": ({"student_weight": lora(b=(V, 2))}, ValueError, r"student_lora_B: .*\(70, 2\)"),
    "lora-scaling": (
        {"student_weight": lora(scaling="2")},
        *(TypeError, "LoraWeight: scaling: expected a number, got '2'"),
    ),
    "lora-dtype": (
        {"student_weight": LoraWeight(randn(V, D), randn(3, D).half(), randn(V, 3))},
        *(TypeError, "student_lora_A: expected torch.float32"),
    ),
    "tile": (
        {"student_weight": QuantizedWeight(STORED, lambda rows: rows.float()[:, 1:])},
        *(ValueError, r"dequantize: expected a float tensor of shape \(70, 12\)"),
    ),
    "tile-dtype": (
        {"student_weight": QuantizedWeight(STORED, lambda rows: rows)},
        *(ValueError, "dequantize: expected a float tensor .*int8"),
    ),
    "device": (
        {"student_weight": QuantizedWeight(STORED.to("meta"), lambda rows: rows)},
        *(ValueError, "student_weight: expected the device of student_hidden, cpu, got meta"),
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_heads(case):
    changes, kind, message = BAD[case]
    with pytest.raises(kind, match=message):
        call(**changes)


def test_bad_quantised_weights():
    with pytest.raises(TypeError, match="dequantize: expected a function of rows, got a Tensor"):
        QuantizedWeight(STORED, STORED)
    with pytest.raises(ValueError, match=r"parts\[0\]: .*\[70, \.\.\.\].*\(3,\)"):
        QuantizedWeight(STORED, torch.mul, torch.ones(3))
    with pytest.raises(ValueError, match="weight: expected a constant"):
        QuantizedWeight(torch.ones(2, 2).requires_grad_(), torch.neg)


@pytest.mark.parametrize("op", ["fwd", "rows"])
def test_opcheck(op):
    from modxfer_fast.kernels.common import KDSpec
    from modxfer_fast.kernels.common.composed_head import head_of

    tensors = leaves_of(torch.float32, "student_hidden", "student_bias", "lora_A", "lora_B")
    stored, _ = int8(randn(V, D, seed=2))
    weight = LoraWeight(stored, tensors["lora_A"], tensors["lora_B"], 0.5)
    head = head_of(tensors["student_hidden"], weight, tensors["student_bias"])
    args = (*head, *TeacherLogits(TEACHER).kind(), None, torch.ones(N), -100, None, None)
    args += (KDSpec().checked().numbers(), KDSpec().names(), 64, "cpp", "forward", None, False)
    args += ([True, False, True, True, True, False],) if op == "fwd" else ()
    torch.library.opcheck(
        getattr(torch.ops.modxfer, f"linear_kd_loss_of_values_in_tiles_{op}").default, args
    )


def test_compiled_equals_eager():
    tensors = leaves_of(torch.float32, "student_hidden", "lora_A", "lora_B")
    stored, _ = int8(randn(V, D, seed=2))
    weight = LoraWeight(stored, tensors["lora_A"], tensors["lora_B"], 0.5)
    args = (tensors["student_hidden"], weight, TeacherLogits(TEACHER))
    torch.compiler.reset()
    loss = torch.compile(linear_kd_loss, backend="aot_eager", fullgraph=True)(*args)
    eager = linear_kd_loss(*args)
    assert torch.equal(loss, eager)
    for one, other in zip(
        torch.autograd.grad(loss, list(tensors.values())),
        torch.autograd.grad(eager, list(tensors.values())),
        strict=True,
    ):
        assert torch.equal(one, other)

"""Bad arguments and unusable backends: errors name the argument, the expected, and what came."""

import re

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from modxfer_fast import (
    BackendError,
    LinearKDLoss,
    kd_loss,
    linear_kd_loss,
    linear_kd_loss_terms,
    use_backend,
)
from modxfer_fast.kernels import dispatch
from modxfer_fast.kernels.common.reduction import denominator
from modxfer_fast.kernels.names import BACKENDS
from modxfer_fast.losses import AttentionRelationLoss, HiddenStateLoss

N, D_S, D_T, V = 6, 8, 12, 20


def linear(function=linear_kd_loss, **changes):
    """A good call of `function`, with some arguments replaced."""
    tensors = {
        "student_hidden": torch.ones(N, D_S),
        "student_weight": torch.ones(V, D_S),
        "teacher_hidden": torch.ones(N, D_T),
        "teacher_weight": torch.ones(V, D_T),
    }
    return function(**tensors | changes)


def logits(**changes):
    tensors = {"student_logits": torch.ones(N, V), "teacher_logits": torch.ones(N, V)}
    return kd_loss(**tensors | changes)


def labels_with(value: int) -> torch.Tensor:
    labels = torch.zeros(N, dtype=torch.int64)
    labels[2] = value
    return labels


def ones(*size, dtype=torch.float32, device="cpu"):
    return torch.ones(size, dtype=dtype, device=device)


NO_LABELS = torch.full((N,), -100)
# arguments, type of the error, words of the message in order: argument, expected, got
SHARED = {
    "divergence": ({"divergence": "kl"}, ValueError, "divergence", "forward_kl", "'kl'"),
    "beta-high": ({"divergence": "jsd", "beta": 1.5}, ValueError, "beta", "[0, 1]", "1.5"),
    "beta-low": ({"divergence": "jsd", "beta": -0.1}, ValueError, "beta", "[0, 1]", "-0.1"),
    "beta-nan": ({"divergence": "jsd", "beta": float("nan")}, ValueError, "beta", "[0, 1]", "nan"),
    "beta-alone": ({"beta": 0.5}, ValueError, "beta", "'jsd'", "beta=0.5 with", "'forward_kl'"),
    "beta-reverse": (
        {"beta": 0.3, "divergence": "reverse_kl"},
        *(ValueError, "beta", "'jsd'", "'reverse_kl'"),
    ),
    "temperature-text": ({"temperature": "2"}, TypeError, "temperature", "a number", "'2'"),
    "kd_weight-text": ({"kd_weight": "1"}, TypeError, "kd_weight", "a number", "'1'"),
    "ignore_index": ({"ignore_index": 1.5}, TypeError, "ignore_index", "an integer", "1.5"),
    "labels-list": ({"labels": [0] * N}, TypeError, "labels", "a tensor", "list"),
    "token_weights-list": (
        {"token_weights": [1.0] * N},
        *(TypeError, "token_weights", "a tensor", "list"),
    ),
    "normalizer-text": ({"normalizer": "3"}, TypeError, "normalizer", "a number", "'3'"),
    "normalizer-tensor-negative": (
        {"normalizer": torch.tensor(-3.0)},
        *(ValueError, "normalizer", "at least 0", "-3.0"),
    ),
    "normalizer-tensor-nan": (
        {"normalizer": torch.tensor(float("nan"))},
        *(ValueError, "normalizer", "at least 0", "nan"),
    ),
    "temperature-negative": ({"temperature": -1.0}, ValueError, "temperature", "positive", "-1.0"),
    "temperature-zero": ({"temperature": 0.0}, ValueError, "temperature", "positive", "0.0"),
    "temperature-nan": (
        {"temperature": float("nan")},
        *(ValueError, "temperature", "positive", "nan"),
    ),
    "temperature-inf": (
        {"temperature": float("inf")},
        *(ValueError, "temperature", "positive", "inf"),
    ),
    "kd_weight": ({"kd_weight": float("nan")}, ValueError, "kd_weight", "finite", "nan"),
    "ce_weight": (
        {"ce_weight": float("inf"), "labels": labels_with(0)},
        *(ValueError, "ce_weight", "finite", "inf"),
    ),
    "reduction": ({"reduction": "avg"}, ValueError, "reduction", "mean, sum, none", "'avg'"),
    "labels-missing": ({"ce_weight": 1.0}, ValueError, "labels", "tensor", "None"),
    "labels-dtype": (
        {"labels": labels_with(0).int()},
        *(TypeError, "labels", "torch.int64", "torch.int32"),
    ),
    "labels-shape": (
        {"labels": torch.zeros(N - 1, dtype=torch.int64)},
        *(ValueError, "labels", "(6,)", "(5,)"),
    ),
    "labels-high": ({"labels": labels_with(V)}, ValueError, "labels", "[0, 20)", "20"),
    "labels-low": ({"labels": labels_with(-1)}, ValueError, "labels", "[0, 20)", "-1"),
    "labels-other-ignore": (
        {"labels": labels_with(-100), "ignore_index": -1},
        *(ValueError, "labels", "ignore_index=-1", "-100"),
    ),
    "labels-device": (
        {"labels": labels_with(0).to("meta")},
        *(ValueError, "labels", "cpu", "meta"),
    ),
    "token_weights-shape": (
        {"token_weights": ones(N, 1)},
        *(ValueError, "token_weights", "(6,)", "(6, 1)"),
    ),
    "normalizer-zero": ({"normalizer": 0}, ValueError, "normalizer", "positive", "0"),
    "normalizer-negative": ({"normalizer": -2.5}, ValueError, "normalizer", "positive", "-2.5"),
    "normalizer-nan": (
        {"normalizer": float("nan")},
        *(ValueError, "normalizer", "positive", "nan"),
    ),
    "normalizer-shape": ({"normalizer": ones(3)}, ValueError, "normalizer", "one number", "(3,)"),
    "normalizer-sum": (
        {"normalizer": 3, "reduction": "sum"},
        *(ValueError, "normalizer", "mean", "'sum'"),
    ),
    "backend": ({"backend": "cutlass"}, ValueError, "backend", "reference", "'cutlass'"),
}
LINEAR = {
    "student_hidden-width": (
        {"student_hidden": ones(N, 9)},
        *(ValueError, "student_hidden", "8", "(6, 9)"),
    ),
    "student_hidden-scalar": (
        {"student_hidden": ones()},
        *(ValueError, "student_hidden", "8", "()"),
    ),
    "student_hidden-dtype": (
        {"student_hidden": ones(N, D_S, dtype=torch.int64)},
        *(TypeError, "student_hidden", "floating point", "torch.int64"),
    ),
    "student_weight-dim": (
        {"student_weight": ones(D_S)},
        *(ValueError, "student_weight", "[V, D]", "(8,)"),
    ),
    "student_weight-empty": (
        {"student_weight": ones(0, D_S)},
        *(ValueError, "student_weight", "V > 0", "(0, 8)"),
    ),
    "student_weight-dtype": (
        {"student_weight": ones(V, D_S, dtype=torch.bfloat16)},
        *(TypeError, "student_weight", "torch.float32", "torch.bfloat16"),
    ),
    "student_weight-device": (
        {"student_weight": ones(V, D_S, device="meta")},
        *(ValueError, "student_weight", "cpu", "meta"),
    ),
    "teacher_hidden-rows": (
        {"teacher_hidden": ones(N + 1, D_T)},
        *(ValueError, "teacher_hidden", "(6,)", "(7,)"),
    ),
    "teacher_hidden-width": (
        {"teacher_hidden": ones(N, D_S)},
        *(ValueError, "teacher_hidden", "12", "(6, 8)"),
    ),
    "teacher_hidden-device": (
        {
            "teacher_hidden": ones(N, D_T, device="meta"),
            "teacher_weight": ones(V, D_T, device="meta"),
        },
        *(ValueError, "teacher_hidden", "cpu", "meta"),
    ),
    "teacher_weight-dtype": (
        {"teacher_weight": ones(V, D_T, dtype=torch.float64)},
        *(TypeError, "teacher_weight", "torch.float32", "torch.float64"),
    ),
    "teacher_weight-vocabulary": (
        {"teacher_weight": ones(V + 1, D_T)},
        *(ValueError, "teacher_weight", "20", "21"),
    ),
    "student_bias-shape": (
        {"student_bias": ones(V + 1)},
        *(ValueError, "student_bias", "(20,)", "(21,)"),
    ),
    "student_bias-dtype": (
        {"student_bias": ones(V, dtype=torch.float16)},
        *(ValueError, "student_bias", "torch.float32", "torch.float16"),
    ),
    "teacher_bias-shape": (
        {"teacher_bias": ones(1, V)},
        *(ValueError, "teacher_bias", "(20,)", "(1, 20)"),
    ),
    "teacher_bias-device": (
        {"teacher_bias": ones(V, device="meta")},
        *(ValueError, "teacher_bias", "cpu", "meta"),
    ),
    "student_weight-module": (
        {"student_weight": torch.nn.Linear(D_S, V)},
        *(TypeError, "student_weight", "a tensor", "Linear"),
    ),
    "teacher_weight-module": (
        {"teacher_weight": torch.nn.Linear(D_T, V)},
        *(TypeError, "teacher_weight", "a tensor", "Linear"),
    ),
    "student_bias-list": (
        {"student_bias": [0.0] * V},
        *(TypeError, "student_bias", "a tensor", "list"),
    ),
    "student_hidden-nested": (
        {"student_hidden": torch.nested.nested_tensor([ones(2, D_S), ones(3, D_S)])},
        *(TypeError, "student_hidden", "dense", "nested"),
    ),
    "teacher_hidden-jagged": (
        {
            "teacher_hidden": torch.nested.nested_tensor(
                [ones(2, D_T), ones(3, D_T)], layout=torch.jagged
            )
        },
        *(TypeError, "teacher_hidden", "dense", "nested"),
    ),
    "student_hidden-sparse": (
        {"student_hidden": ones(N, D_S).to_sparse()},
        *(TypeError, "student_hidden", "dense", "sparse"),
    ),
    "workspace_mb-text": (
        {"workspace_mb": "512"},
        *(TypeError, "workspace_mb", "an integer", "'512'"),
    ),
    "workspace_mb-zero": ({"workspace_mb": 0}, ValueError, "workspace_mb", "positive", "0"),
    "workspace_mb-negative": ({"workspace_mb": -5}, ValueError, "workspace_mb", "positive", "-5"),
    "filter_eps-zero": ({"filter_eps": 0.0}, ValueError, "filter_eps", "positive", "0.0"),
    "filter_eps-text": ({"filter_eps": "auto"}, TypeError, "filter_eps", "number", "'auto'"),
    "gradients-name": (
        {"gradients": "checkpoint"},
        *(ValueError, "gradients", "recompute", "checkpoint"),
    ),
    "num_valid-alone": ({"num_valid": 3}, ValueError, "num_valid", "labels", "3"),
    "num_valid-wrong": (
        {"labels": labels_with(-100), "num_valid": 4},
        *(ValueError, "num_valid", "5", "4"),
    ),
    "num_valid-negative": (
        {"labels": NO_LABELS, "num_valid": -1},
        *(ValueError, "num_valid", "0", "-1"),
    ),
}
LOGITS = {
    "student_logits-list": (
        {"student_logits": [[0.0] * V] * N},
        *(TypeError, "student_logits", "a tensor", "list"),
    ),
    "student_logits-nested": (
        {"student_logits": torch.nested.nested_tensor([ones(2, V), ones(3, V)])},
        *(TypeError, "student_logits", "dense", "nested"),
    ),
    "student_logits-dtype": (
        {"student_logits": ones(N, V, dtype=torch.int32)},
        *(TypeError, "student_logits", "floating point", "torch.int32"),
    ),
    "student_logits-scalar": (
        {"student_logits": ones(), "teacher_logits": ones()},
        *(ValueError, "student_logits", "[..., V]", "()"),
    ),
    "student_logits-empty": (
        {"student_logits": ones(N, 0), "teacher_logits": ones(N, 0)},
        *(ValueError, "student_logits", "V > 0", "(6, 0)"),
    ),
    "teacher_logits-dtype": (
        {"teacher_logits": ones(N, V, dtype=torch.bool)},
        *(TypeError, "teacher_logits", "floating point", "torch.bool"),
    ),
    "teacher_logits-vocabulary": (
        {"teacher_logits": ones(N, V + 1)},
        *(ValueError, "teacher_logits", "(6, 20)", "(6, 21)"),
    ),
    "teacher_logits-device": (
        {"teacher_logits": ones(N, V, device="meta")},
        *(ValueError, "teacher_logits", "cpu", "meta"),
    ),
}


def assert_says(message: str, *words: str) -> None:
    pattern = ".*".join(re.escape(word) for word in words)
    assert re.match(pattern, message, re.DOTALL), f"{message!r} does not say {words}"


def raises_clearly(call, case):
    arguments, error_type, argument, expected, *got = case
    with pytest.raises(error_type) as caught:
        call(**arguments)
    assert type(caught.value) is error_type
    assert_says(str(caught.value), f"{argument}: expected", expected, "got", *got)


@pytest.mark.parametrize("case", (SHARED | LINEAR).values(), ids=(SHARED | LINEAR).keys())
def test_linear_kd_loss(case):
    raises_clearly(linear, case)


@pytest.mark.parametrize("case", (SHARED | LINEAR).values(), ids=(SHARED | LINEAR).keys())
def test_linear_kd_loss_terms(case):
    raises_clearly(lambda **changes: linear(linear_kd_loss_terms, **changes), case)


@pytest.mark.parametrize("case", (SHARED | LOGITS).values(), ids=(SHARED | LOGITS).keys())
def test_kd_loss(case):
    raises_clearly(logits, case)


def test_the_good_calls_are_good():
    assert linear().item() == pytest.approx(0.0, abs=1e-6)
    assert logits().item() == pytest.approx(0.0, abs=1e-6)
    assert linear(labels=labels_with(-100), num_valid=5, normalizer=3).isfinite()


def test_a_normalizer_tensor_of_0_divides_by_1():
    apart = {"student_weight": torch.eye(V, D_S)}
    assert linear(**apart, normalizer=torch.tensor(0)) == linear(**apart, reduction="sum") != 0


class Calls(TorchDispatchMode):
    """Notes what torch does."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("normalizer", [3.0, torch.tensor(3.0), torch.tensor([3])], ids=str)
def test_a_normalizer_of_the_host_is_not_copied_to_the_device(normalizer):
    like = torch.empty(5, device="meta")  # stands for a GPU, where a copy from the host waits
    with Calls() as calls:
        divisor = denominator("mean", normalizer, None, like, torch.float32)
    assert (divisor.device, divisor.dtype, divisor.shape) == (like.device, torch.float32, ())
    assert not [name for name in calls.names if "copy" in name]


MODULES = {
    "LinearKDLoss": LinearKDLoss,
    "HiddenStateLoss": lambda **options: HiddenStateLoss({1: 1}, 8, 8, **options),
    "AttentionRelationLoss": lambda **options: AttentionRelationLoss({1: 1}, **options),
}


@pytest.mark.parametrize(
    ("module", "options", "error", "words"),
    [
        *((m, {"workspace_mb": 0}, ValueError, ("workspace_mb", "positive", "0")) for m in MODULES),
        *((m, {"workspace_mb": "8"}, TypeError, ("workspace_mb", "integer")) for m in MODULES),
        *((m, {"backend": "nope"}, ValueError, ("backend", "reference", "nope")) for m in MODULES),
        ("LinearKDLoss", {"gradients": "now"}, ValueError, ("gradients", "recompute", "now")),
        ("LinearKDLoss", {"reduction": "avg"}, ValueError, ("reduction", "mean", "avg")),
        ("LinearKDLoss", {"ignore_index": 1.5}, TypeError, ("ignore_index", "integer", "1.5")),
        ("LinearKDLoss", {"beta": 0.5}, ValueError, ("beta", "jsd", "forward_kl")),
        ("HiddenStateLoss", {"beta": 0.5}, ValueError, ("beta", "smooth_l1", "mse")),
    ],
)
def test_modules_refuse_options_when_they_are_made(module, options, error, words):
    with pytest.raises(error) as caught:
        MODULES[module](**options)
    assert_says(str(caught.value), *words)


def test_beta_that_is_read():
    assert LinearKDLoss(divergence="jsd", beta=0.3).options["beta"] == 0.3
    HiddenStateLoss({1: 1}, 8, 8, loss="smooth_l1", beta=0.3)
    given = {"student_weight": torch.eye(V, D_S), "divergence": "jsd"}
    assert linear(**given) == linear(**given, beta=0.5) != linear(**given, beta=0.4)


def test_options_are_keyword_only():
    with pytest.raises(TypeError):
        kd_loss(ones(N, V), ones(N, V), labels_with(0))
    with pytest.raises(TypeError):
        linear_kd_loss(ones(N, 8), ones(V, 8), ones(N, 8), ones(V, 8), labels_with(0))


# --- MODXFER_DEBUG


TENSORS = {
    "student_hidden": (N, D_S),
    "student_weight": (V, D_S),
    "teacher_hidden": (N, D_T),
    "teacher_weight": (V, D_T),
    "student_bias": (V,),
    "teacher_bias": (V,),
}


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", TENSORS)
def test_debug_names_the_tensor_with_nan(monkeypatch, name, reduction):
    bad = ones(*TENSORS[name])
    bad.view(-1)[3] = float("nan")
    linear(reduction=reduction, **{name: bad})
    monkeypatch.setenv("MODXFER_DEBUG", "1")
    with pytest.raises(ValueError, match=f"{name}: expected no NaN, got 1"):
        linear(reduction=reduction, **{name: bad})


@pytest.mark.parametrize("name", ["student_logits", "teacher_logits"])
def test_debug_names_the_logits_with_nan(monkeypatch, name):
    bad = ones(N, V)
    bad[1, 3] = float("nan")
    logits(**{name: bad})
    monkeypatch.setenv("MODXFER_DEBUG", "1")
    with pytest.raises(ValueError, match=f"{name}: expected no NaN, got 1"):
        logits(**{name: bad})


@pytest.mark.parametrize("value", ["", "0"])
def test_debug_is_off(monkeypatch, value):
    monkeypatch.setenv("MODXFER_DEBUG", value)
    logits(student_logits=torch.full((N, V), float("nan")))


# --- backends


@pytest.mark.parametrize("call", [linear, logits])
def test_named_backend_runs_or_raises(call):
    wide = {
        "student_hidden": (N, D_S),
        "student_weight": (V, D_S),
        "teacher_hidden": (N, D_T),
        "teacher_weight": (V, D_T),
    }
    if call is logits:
        wide = {"student_logits": (N, V), "teacher_logits": (N, V)}
    fp64 = {name: ones(*size, dtype=torch.float64) for name, size in wide.items()}
    assert call(**fp64).dtype == torch.float64  # the automatic choice may move on
    for select in (lambda: call(backend="cpp", **fp64), lambda: with_backend("cpp", call, fp64)):
        with pytest.raises(BackendError) as caught:
            select()
        assert_says(str(caught.value), "", "cpp", "float32", "float64")


def with_backend(name, call, arguments):
    with use_backend(name):
        return call(**arguments)


@pytest.mark.parametrize("call", [linear, logits])
def test_unavailable_backend_says_why_and_nothing_else_runs(monkeypatch, call):
    real = dispatch.availability

    def without_cpp(room, backend):
        return (False, "csrc is not built here") if backend == "cpp" else real(room, backend)

    monkeypatch.setattr(dispatch, "availability", without_cpp)
    expected = call(backend="reference")
    with pytest.raises(BackendError, match="cpp: csrc is not built here"):
        call(backend="cpp")
    assert torch.equal(call(), expected)
    monkeypatch.setattr(dispatch, "availability", lambda room, backend: (False, f"no {backend}"))
    with pytest.raises(BackendError, match=r"no cpp.*no reference"):
        call()


def test_availability_survives_a_backend_that_cannot_be_imported(monkeypatch):
    def broken(room, backend):
        raise ImportError("No module named 'gpu_toolkit'")

    monkeypatch.setattr(dispatch, "load", broken)
    dispatch.availability.cache_clear()
    try:
        ok, reason = dispatch.availability("kd_loss", "cpp")
    finally:
        dispatch.availability.cache_clear()
    assert not ok
    assert "gpu_toolkit" in reason


def chosen(**options) -> str:
    return dispatch.resolve("kd_loss", ones(2, 3), **options)


def test_use_backend_nests_and_restores():
    automatic = chosen()
    with use_backend("reference"):
        assert chosen() == "reference"
        with use_backend("cpp"):
            assert chosen() == "cpp"
            assert chosen(backend="reference") == "reference"  # the argument wins
            with use_backend(None):
                assert chosen() == automatic
            assert chosen() == "cpp"
        assert chosen() == "reference"
        with pytest.raises(KeyError), use_backend("cpp"):
            raise KeyError
        assert chosen() == "reference"
    assert chosen() == automatic == "cpp"


def test_use_backend_refuses_unknown_names():
    with (
        pytest.raises(ValueError, match=r"backend: expected one of .*got 'cutlass'"),
        use_backend("cutlass"),
    ):
        pass
    assert chosen() == "cpp"


def test_environment_chooses_below_the_argument_and_use_backend(monkeypatch):
    monkeypatch.setenv("MODXFER_BACKEND", "reference")
    assert chosen() == "reference"
    assert chosen(backend="cpp") == "cpp"
    with use_backend("cpp"):
        assert chosen() == "cpp"
    monkeypatch.setenv("MODXFER_BACKEND", "")
    assert chosen() == "cpp"
    monkeypatch.setenv("MODXFER_BACKEND", "cutlass")
    with pytest.raises(ValueError, match="cutlass"):
        logits()


def test_environment_never_falls_through(monkeypatch):
    monkeypatch.setenv("MODXFER_BACKEND", "cpp")
    with pytest.raises(BackendError, match=r"cpp.*float64"):
        logits(
            student_logits=ones(N, V, dtype=torch.float64),
            teacher_logits=ones(N, V, dtype=torch.float64),
        )


def test_backward_runs_on_the_backend_of_the_forward(monkeypatch):
    student = torch.randn(4, 9, requires_grad=True)
    with use_backend("reference"):
        loss = kd_loss(student, torch.randn(4, 9))
    used = []
    load = dispatch.load
    monkeypatch.setattr(dispatch, "load", lambda room, name: used.append(name) or load(room, name))
    with use_backend("cpp"):
        loss.backward()
    assert used == ["reference"]


def test_table_names_every_room_and_backend_with_a_reason():
    table = dispatch.table()
    backends = dict.fromkeys(dispatch.ROOMS, BACKENDS)
    assert {room: tuple(found) for room, found in table.items()} == backends
    for backends in table.values():
        for state in backends.values():
            assert set(state) == {"available", "reason"}
            assert state["available"] is True or state["reason"]

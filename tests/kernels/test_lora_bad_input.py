"""Bad arguments of the LoRA linears: errors name the argument, the expected, and what came."""

import pytest
import torch

from modxfer_fast import BackendError, use_backend
from modxfer_fast.kernels import dispatch
from modxfer_fast.kernels.lora_linear import LoraTarget, lora_linear, lora_linear_group
from tests.kernels.test_bad_input import assert_says, ones

M, K, N, R = 6, 24, 20, 4
GOOD = {
    "x": ones(M, K),
    "weight": ones(N, K),
    "lora_a": ones(R, K),
    "lora_b": ones(N, R),
    "scaling": 2.0,
    "bias": ones(N),
    "dropout": 0.0,
}
NAN, INF = float("nan"), float("inf")


def one(**changes):
    """A good call, with some arguments replaced."""
    return lora_linear(**GOOD | changes)


def second_of_two(**changes):
    arguments = GOOD | changes
    around = {key: arguments.pop(key) for key in ("seed", "backend") if key in arguments}
    x = arguments.pop("x")
    good = {key: value for key, value in GOOD.items() if key != "x"}
    if "x" in changes:  # what is wrong with x shows at the first target
        good = arguments
    return lora_linear_group(x, [LoraTarget(**good), LoraTarget(**arguments)], **around)


# arguments, type of the error, argument, expected, got
OF_ALL = {
    "x-dtype": ({"x": ones(M, K, dtype=torch.int64)}, TypeError, "x", "floating point", "int64"),
    "x-scalar": ({"x": ones()}, ValueError, "x", "[..., K]", "()"),
    "seed-number": ({"seed": 3, "dropout": 0.5}, TypeError, "seed", "a tensor", "int"),
    "seed-dtype": (
        {"seed": torch.tensor(1.0), "dropout": 0.5},
        *(ValueError, "seed", "int64", "torch.float32"),
    ),
    "seed-shape": (
        {"seed": torch.tensor([1, 2]), "dropout": 0.5},
        *(ValueError, "seed", "one int64", "(2,)"),
    ),
    "seed-device": (
        {"seed": torch.empty((), dtype=torch.int64, device="meta"), "dropout": 0.5},
        *(ValueError, "seed", "cpu", "meta"),
    ),
    "backend": ({"backend": "cutlass"}, ValueError, "backend", "reference", "'cutlass'"),
}
OF_A_TARGET = {
    "lora_a-width": ({"lora_a": ones(R, K + 1)}, ValueError, "lora_a", "24", "(4, 25)"),
    "lora_a-dim": ({"lora_a": ones(K)}, ValueError, "lora_a", "[R, 24]", "(24,)"),
    "lora_a-empty": ({"lora_a": ones(0, K)}, ValueError, "lora_a", "R > 0", "(0, 24)"),
    "lora_a-dtype": (
        {"lora_a": ones(R, K, dtype=torch.float16)},
        *(TypeError, "lora_a", "torch.float32", "torch.float16"),
    ),
    "lora_a-integer": (
        {"lora_a": ones(R, K, dtype=torch.int64)},
        *(TypeError, "lora_a", "torch.float32", "torch.int64"),
    ),
    "lora_a-device": ({"lora_a": ones(R, K, device="meta")}, ValueError, "lora_a", "cpu", "meta"),
    "lora_b-rank": ({"lora_b": ones(N, R + 1)}, ValueError, "lora_b", "[N, 4]", "(20, 5)"),
    "lora_b-dim": ({"lora_b": ones(N)}, ValueError, "lora_b", "[N, 4]", "(20,)"),
    "lora_b-empty": (
        {"lora_b": ones(0, R), "weight": ones(0, K), "bias": ones(0)},
        *(ValueError, "lora_b", "N > 0", "(0, 4)"),
    ),
    "lora_b-dtype": (
        {"lora_b": ones(N, R, dtype=torch.bfloat16)},
        *(TypeError, "lora_b", "torch.float32", "torch.bfloat16"),
    ),
    "lora_b-device": ({"lora_b": ones(N, R, device="meta")}, ValueError, "lora_b", "cpu", "meta"),
    "weight-shape": ({"weight": ones(K, N)}, ValueError, "weight", "(20, 24)", "(24, 20)"),
    "weight-dim": ({"weight": ones(N * K)}, ValueError, "weight", "(20, 24)", "(480,)"),
    "weight-dtype": (
        {"weight": ones(N, K, dtype=torch.bfloat16)},
        *(TypeError, "weight", "torch.float32", "torch.bfloat16"),
    ),
    "weight-device": ({"weight": ones(N, K, device="meta")}, ValueError, "weight", "cpu", "meta"),
    "bias-shape": ({"bias": ones(N + 1)}, ValueError, "bias", "(20,)", "(21,)"),
    "bias-dim": ({"bias": ones(1, N)}, ValueError, "bias", "(20,)", "(1, 20)"),
    "bias-dtype": (
        {"bias": ones(N, dtype=torch.float64)},
        *(TypeError, "bias", "torch.float32", "torch.float64"),
    ),
    "bias-device": ({"bias": ones(N, device="meta")}, ValueError, "bias", "cpu", "meta"),
    "dropout-high": ({"dropout": 1.5}, ValueError, "dropout", "[0, 1]", "1.5"),
    "dropout-low": ({"dropout": -0.1}, ValueError, "dropout", "[0, 1]", "-0.1"),
    "dropout-nan": ({"dropout": NAN}, ValueError, "dropout", "[0, 1]", "nan"),
    "scaling-nan": ({"scaling": NAN}, ValueError, "scaling", "finite", "nan"),
    "scaling-inf": ({"scaling": -INF}, ValueError, "scaling", "finite", "-inf"),
}


def raises_clearly(call, case, prefix: str = "") -> None:
    arguments, error_type, argument, expected, got = case
    with pytest.raises(error_type) as caught:
        call(**arguments)
    assert type(caught.value) is error_type
    assert_says(str(caught.value), f"{prefix}{argument}: expected", expected, "got", got)


@pytest.mark.parametrize("case", (OF_ALL | OF_A_TARGET).values(), ids=(OF_ALL | OF_A_TARGET).keys())
def test_lora_linear(case):
    raises_clearly(one, case)


@pytest.mark.parametrize("case", OF_ALL.values(), ids=OF_ALL.keys())
def test_lora_linear_group(case):
    raises_clearly(second_of_two, case)


@pytest.mark.parametrize("case", OF_A_TARGET.values(), ids=OF_A_TARGET.keys())
def test_lora_linear_group_names_the_target(case):
    raises_clearly(second_of_two, case, "targets[1].")


def test_a_group_has_a_target():
    with pytest.raises(ValueError, match="targets: expected at least one LoraTarget, got none"):
        lora_linear_group(ones(M, K), [])


def test_adapters_beside_half_precision_and_fp64():
    half = {key: GOOD[key].bfloat16() for key in ("x", "weight", "bias")}
    with pytest.raises(TypeError) as caught:
        one(**half, lora_a=ones(R, K, dtype=torch.float64), lora_b=ones(N, R, dtype=torch.float64))
    assert_says(str(caught.value), "lora_a: expected", "bfloat16", "float32", "got", "float64")
    wide = {key: GOOD[key].double() for key in ("x", "weight", "bias")}
    with pytest.raises(TypeError) as caught:
        one(**wide)
    assert_says(str(caught.value), "lora_a: expected", "float64", "got", "float32")


def test_adapters_of_a_group_have_one_dtype():
    """s of all targets is one tensor."""
    x = ones(M, K, dtype=torch.bfloat16)
    targets = [
        LoraTarget(None, ones(R, K, dtype=dtype), ones(N, R, dtype=dtype), 2.0)
        for dtype in (torch.bfloat16, torch.float32)
    ]
    with pytest.raises(TypeError) as caught:
        lora_linear_group(x, targets)
    assert_says(str(caught.value), "targets[1].lora_a: expected", "bfloat16", "got", "float32")


def test_the_good_calls_are_good():
    assert (one() == K + 2.0 * R * K + 1.0).all()
    for y in second_of_two():
        assert torch.equal(y, one())
    assert one(seed=torch.tensor([5]), dropout=0.5).isfinite().all()
    assert one(weight=None, bias=None, x=ones(K)).shape == (N,)


def test_options_are_keyword_only():
    with pytest.raises(TypeError):
        lora_linear(*(GOOD[key] for key in ("x", "weight", "lora_a", "lora_b", "scaling")))
    with pytest.raises(TypeError):
        lora_linear_group(ones(M, K), [LoraTarget(None, ones(R, K), ones(N, R), 2.0)], None)


# --- backends


FP64 = {key: value.double() if torch.is_tensor(value) else value for key, value in GOOD.items()}


def test_a_named_backend_runs_or_raises():
    assert one(**FP64).dtype == torch.float64  # the automatic choice may move on
    with pytest.raises(BackendError) as caught:
        one(**FP64, backend="cpp")
    assert_says(str(caught.value), "lora_linear", "cpp")
    with use_backend("cpp"), pytest.raises(BackendError):
        one(**FP64)


def test_an_unavailable_backend_says_why_and_nothing_else_runs(monkeypatch):
    real = dispatch.availability

    def without_cpp(room, backend):
        return (False, "csrc is not built here") if backend == "cpp" else real(room, backend)

    monkeypatch.setattr(dispatch, "availability", without_cpp)
    with pytest.raises(BackendError, match="cpp: csrc is not built here"):
        one(backend="cpp")
    assert torch.equal(one(), one(backend="reference"))


def test_backward_runs_on_the_backend_of_the_forward(monkeypatch):
    x = torch.randn(M, K, requires_grad=True)
    with use_backend("reference"):
        y = one(x=x)
    used = []
    load = dispatch.load
    monkeypatch.setattr(dispatch, "load", lambda room, name: used.append(name) or load(room, name))
    with use_backend("triton"):
        y.sum().backward()
    assert used == ["reference"]

"""LoRA linears, forward and backward, against PEFT, addmm-style functions and the frozen linears.

M rows (tokens)   K -> N_t widths of target t   R rank   b bytes an element
FLOPs of the floor, the frozen linears: 4 M K N_t a target (y, and dx without dweight). Of the
formula: 6 M R (K + N_t) more (s, s B^T, ds, dB, ds A, dA).
Bytes of the floor: both products of a target read two of x, y, W and write the third; the sum over
targets of dx reads two and writes one, M K each. Of the formula: each pass reads x once, dx is
written once, s is written and read, each target's W, A, B are read by both passes, y and dA, dB
written, dy read; the mask is one bit an element, written and read.

Exact masks can be asked of our op only. Peers draw theirs from torch's generator, so they are
checked without dropout, and timed with it.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import peers, unsloth_style
from benchmarks.candidates import forward_backward, our_backends
from benchmarks.harness import Candidate, Floor, Lineup
from benchmarks.inputs import Normal
from benchmarks.rooms import Case, Room
from benchmarks.shapes import Sizes
from modxfer_fast.kernels.lora_linear import LoraTarget, lora_linear_group
from modxfer_fast.kernels.lora_linear.dropout import dropout_bits, unpack
from modxfer_fast.kernels.lora_linear.reference import lora_linear_reference
from modxfer_fast.measure.roofline import Work

FLOOR = "frozen linears"
# rounding of y, s, ds and of both parts of dx, one after another, where adapters are in half
# precision; a wrong mask, scale or missing part is off by a tenth and more
BUDGET = {torch.float32: 1e-4, torch.float16: 3e-3, torch.bfloat16: 1e-2}
SCALING = 2.0
_SEED = 1234
# the widths of each target: from the residual stream to it, or back from the feed-forward width
_TARGETS = {
    "single": (("o", "H", "H"),),
    "qkv": (("q", "H", "H"), ("k", "H", "H_kv"), ("v", "H", "H_kv")),
    "gate_up": (("gate", "H", "F"), ("up", "H", "F")),
    "down": (("down", "F", "H"),),
}


@dataclass(frozen=True)
class Shape(Sizes):
    """M rows (tokens), H, H_kv and F widths of a layer (heads, key-value heads, feed-forward)."""

    M: int
    H: int
    H_kv: int
    F: int
    R: int = 16


ROOM = Room(
    shapes={
        "smoke": Shape(64, 64, 32, 96, 8),
        "cpu-gate": Shape(2048, 1024, 256, 2816),
        "llama3-8b": Shape(8192, 4096, 1024, 14336),
        "llama3-8b-r64": Shape(8192, 4096, 1024, 14336, 64),
        "llama3-70b": Shape(8192, 8192, 1024, 28672),
        "llama3-1b": Shape(8192, 2048, 512, 8192),
        "qwen2.5-1.5b": Shape(8192, 1536, 256, 8960),
        "qwen3-0.6b": Shape(8192, 1024, 1024, 3072),
    },
    default_shape={"cpu": "cpu-gate", "cuda": "llama3-8b"},
    axis="targets",
    variants=tuple(_TARGETS),
    options={"dropout": 0.1},
)


@dataclass(frozen=True)
class Problem:
    """Tensors of one case; adapters hold values that every dtype of the case represents."""

    names: tuple[str, ...]
    x: Tensor  # [M, K]
    dys: list[Tensor]  # [M, N] each
    weights: list[Tensor]  # [N, K]
    lora_a: list[Tensor]  # [R, K]
    lora_b: list[Tensor]  # [N, R]
    dropout: float

    @property
    def outputs(self) -> tuple[str, ...]:
        per_target = (f"{kind}_{name}" for name in self.names for kind in ("y", "da", "db"))
        return ("dx", *per_target)


def lineup(case: Case) -> Lineup:
    problem = _problem(case)
    masked = functools.partial(_truth, problem, _masks(problem))
    unmasked = masked if problem.dropout == 0.0 else functools.partial(_truth, problem, None)
    half = case.dtype != torch.float32
    candidates = []
    for backend in our_backends("lora_linear", case.device, case.dtype):
        candidates.append(_ours(problem, backend, case.dtype))
        if half:
            candidates.append(_ours(problem, backend, torch.float32))
    others = [
        *_peft(problem, case, "peft"),
        *_peft(problem, case, "peft, torch.compile", compiled=True),
        _unsloth(problem, problem.dropout),
    ]
    if problem.dropout > 0.0:
        others.append(_unsloth(problem, 0.0))
    formula = functools.partial(dataclasses.replace, work=work(problem))
    candidates = [formula(c) for c in candidates]
    candidates += [formula(c, truth=unmasked) for c in others]
    return Lineup(_columns(case, problem), candidates, floors(problem), masked, graphs=True)


def work(problem: Problem) -> Work:
    """Of the formula, one pass over x and dy each."""
    x, size = problem.x, problem.x.element_size()
    (rows, width), flops = x.shape, 0
    elements = 3 * x.numel()  # x in both passes, dx
    bits = 0
    for weight, lora_a, lora_b in zip(problem.weights, problem.lora_a, problem.lora_b, strict=True):
        rank, out = lora_a.shape[0], weight.shape[0]
        flops += 4 * rows * width * out + 6 * rows * rank * (width + out)
        adapters = lora_a.numel() + lora_b.numel()
        elements += 2 * weight.numel() + 3 * adapters + 2 * rows * out + 2 * rows * rank
        bits += 2 * x.numel() if problem.dropout > 0.0 else 0
    return Work(flops, size * elements + bits // 8)


def floors(problem: Problem) -> dict[str, Floor]:
    """The frozen linears and the gradient of their input, summed as autograd sums it."""
    x, dys, weights = problem.x, problem.dys, problem.weights
    ys, dx = [torch.empty_like(dy) for dy in dys], torch.empty_like(x)
    part = torch.empty_like(x) if len(dys) > 1 else None

    def frozen() -> None:
        for y, weight in zip(ys, weights, strict=True):
            torch.mm(x, weight.t(), out=y)
        torch.mm(dys[0], weights[0], out=dx)
        for dy, weight in zip(dys[1:], weights[1:], strict=True):
            torch.mm(dy, weight, out=part)
            dx.add_(part)

    flops = sum(4 * x.shape[0] * weight.numel() for weight in weights)
    elements = sum(
        2 * (x.numel() + w.numel() + dy.numel()) for w, dy in zip(weights, dys, strict=True)
    )
    elements += 3 * x.numel() * (len(dys) - 1)
    return {FLOOR: Floor(frozen, Work(flops, x.element_size() * elements))}


def _ours(problem: Problem, backend: str, adapters: torch.dtype) -> Candidate:
    x = problem.x.detach().requires_grad_()
    lora_a, lora_b = _leaves(problem.lora_a, adapters), _leaves(problem.lora_b, adapters)
    targets = [
        LoraTarget(weight, a, b, SCALING, dropout=problem.dropout)
        for weight, a, b in zip(problem.weights, lora_a, lora_b, strict=True)
    ]
    seed = torch.tensor(_SEED, device=x.device)

    def forward(seed: Tensor | None = None) -> Sequence[Tensor]:
        return lora_linear_group(x, targets, seed=seed, backend=backend)

    name = f"ours {backend}" + (", fp32 adapters" if adapters != x.dtype else "")
    step = functools.partial(_step, problem, x=x, lora_a=lora_a, lora_b=lora_b)
    return Candidate(
        name,
        step(forward),
        problem.outputs,
        FLOOR,
        weights=(*problem.weights, *lora_a, *lora_b),
        budget=BUDGET,
        check_step=step(lambda: forward(seed)),
    )


def _peft(problem: Problem, case: Case, name: str, compiled: bool = False) -> list[Candidate]:
    """One in fp32; in half precision adapters as PEFT makes them, alone and under AMP, or cast."""
    if case.dtype == torch.float32:
        return [_peft_candidate(problem, name, case.dtype, compiled)]
    short = {torch.bfloat16: "bf16", torch.float16: "fp16"}[case.dtype]
    return [
        _peft_candidate(problem, f"{name}, AMP", torch.float32, compiled, amp=True),
        _peft_candidate(problem, f"{name}, fp32 adapters", torch.float32, compiled),
        _peft_candidate(problem, f"{name}, {short} adapters", case.dtype, compiled),
    ]


def _peft_candidate(
    problem: Problem, name: str, adapters: torch.dtype, compiled: bool, amp: bool = False
) -> Candidate:
    name = peers.label("peft", "peft") + name.removeprefix("peft")
    inject, why_not = peers.peft_inject()
    if inject is None:
        return Candidate(name, None, problem.outputs, FLOOR, why_not=why_not)
    module = _peft_module(problem, inject, adapters)
    x = problem.x.detach().requires_grad_()
    layers = [getattr(module, target) for target in problem.names]

    def linears(x: Tensor) -> list[Tensor]:
        with torch.autocast(x.device.type, dtype=x.dtype, enabled=amp):
            return [layer(x) for layer in layers]

    function = torch.compile(linears, dynamic=False) if compiled else linears
    step = _step(
        problem,
        lambda: function(x),
        x=x,
        lora_a=[layer.lora_A["default"].weight for layer in layers],
        lora_b=[layer.lora_B["default"].weight for layer in layers],
    )
    return Candidate(
        name,
        step,
        problem.outputs,
        FLOOR,
        weights=tuple(module.parameters()),
        budget=BUDGET,
        check_step=functools.partial(peers.without_dropout, module, step),
    )


def _peft_module(problem: Problem, inject, adapters: torch.dtype) -> torch.nn.Module:
    module = torch.nn.Module()
    for name, weight in zip(problem.names, problem.weights, strict=True):
        linear = torch.nn.Linear(*reversed(weight.shape), bias=False, device="meta")
        linear.weight = torch.nn.Parameter(weight, requires_grad=False)
        setattr(module, name, linear)
    rank = problem.lora_a[0].shape[0]
    module = inject(module, problem.names, rank, SCALING, problem.dropout)
    for name, lora_a, lora_b in zip(problem.names, problem.lora_a, problem.lora_b, strict=True):
        layer = getattr(module, name)
        layer.lora_A["default"].weight = torch.nn.Parameter(lora_a.to(adapters, copy=True))
        layer.lora_B["default"].weight = torch.nn.Parameter(lora_b.to(adapters, copy=True))
    return module


def _unsloth(problem: Problem, dropout: float) -> Candidate:
    x = problem.x.detach().requires_grad_()
    lora_a, lora_b = (_leaves(tensors, x.dtype) for tensors in (problem.lora_a, problem.lora_b))
    targets = [
        unsloth_style.Target(*tensors)
        for tensors in zip(problem.weights, lora_a, lora_b, strict=True)
    ]

    def step(dropout: float):
        forward = lambda: unsloth_style.lora_linears(x, targets, SCALING, dropout)
        return _step(problem, forward, x=x, lora_a=lora_a, lora_b=lora_b)

    return Candidate(
        "addmm function" + (" without dropout" if dropout != problem.dropout else ""),
        step(dropout),
        problem.outputs,
        FLOOR,
        weights=(*problem.weights, *lora_a, *lora_b),
        budget=BUDGET,
        check_step=step(0.0),
    )


def _step(
    problem: Problem,
    forward: Callable[[], Sequence[Tensor]],
    *,
    x: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
) -> Callable[[], Mapping[str, Tensor]]:
    leaves = {"dx": x}
    for name, a, b in zip(problem.names, lora_a, lora_b, strict=True):
        leaves |= {f"da_{name}": a, f"db_{name}": b}
    names = [f"y_{name}" for name in problem.names]
    return forward_backward(forward, names, problem.dys, leaves)


def _leaves(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [tensor.to(dtype, copy=True).requires_grad_() for tensor in tensors]


def _problem(case: Case) -> Problem:
    """Unit x and dy, weights that keep the scale, and a LoRA part as large as the base's."""
    dropout = case.options["dropout"]
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout: expected a number in [0, 1), got {dropout}")
    shape, randn = case.shape, Normal(case.device, seed=0)
    names, widths, outs = zip(*_TARGETS[case.variant], strict=True)
    width, outs = getattr(shape, widths[0]), [getattr(shape, out) for out in outs]
    scale = 1.0 / math.sqrt(width)
    return Problem(
        names,
        randn(shape.M, width).to(case.dtype),
        [randn(shape.M, out).to(case.dtype) for out in outs],
        [randn(out, width).mul_(scale).to(case.dtype) for out in outs],
        [randn(shape.R, width).mul_(scale).to(case.dtype) for _ in outs],
        [randn(out, shape.R).div_(SCALING * math.sqrt(shape.R)).to(case.dtype) for out in outs],
        dropout,
    )


def _masks(problem: Problem) -> list[Tensor] | None:
    if problem.dropout == 0.0:
        return None
    seed = torch.tensor(_SEED, device=problem.x.device)
    bits = dropout_bits(seed, *problem.x.shape, [problem.dropout] * len(problem.names))
    return [unpack(target, problem.x.shape[1]) for target in bits]


def _truth(problem: Problem, masks: list[Tensor] | None) -> dict[str, Tensor]:
    x = problem.x.double().requires_grad_()
    lora_a, lora_b = (_leaves(t, torch.float64) for t in (problem.lora_a, problem.lora_b))
    targets = [
        LoraTarget(weight.double(), a, b, SCALING, dropout=problem.dropout)
        for weight, a, b in zip(problem.weights, lora_a, lora_b, strict=True)
    ]
    forward = lambda: lora_linear_reference(x, targets, masks or [None] * len(targets))
    wide = dataclasses.replace(problem, dys=[dy.double() for dy in problem.dys])
    return _step(wide, forward, x=x, lora_a=lora_a, lora_b=lora_b)()


def _columns(case: Case, problem: Problem) -> dict[str, int | float | str]:
    outs = "+".join(str(weight.shape[0]) for weight in problem.weights)
    return {
        "M": case.shape.M,
        "K": problem.x.shape[1],
        "N": int(outs) if outs.isdigit() else outs,
        "R": case.shape.R,
        "targets": case.variant,
        "dropout": problem.dropout,
    }

"""LoRA linears, forward and backward, against PEFT, addmm-style functions and the frozen linears.

M rows (tokens)   K -> N_t widths of target t   R rank   b bytes an element
FLOPs of the floor, the frozen linears: 4 M K N_t a target (y, and dx without dweight). Of the
formula: 6 M R (K + N_t) more (s, s B^T, ds, dB, ds A, dA).
Bytes of the floor: both products of a target read two of x, y, W and write the third; the sum over
targets of dx reads two and writes one, M K each. Of the formula: each pass reads x once, dx is
written once, s is written and read, each target's W, A, B are read by both passes, y and dA, dB
written, dy read; the mask is one bit an element, written and read.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks import lora, peers, rooms
from benchmarks.lora import BUDGET, SCALING
from benchmarks.rooms import Candidate, Case, Floor, Lineup
from modxfer_fast.kernels.lora_linear import LoraTarget, lora_linear_group
from modxfer_fast.kernels.lora_linear.reference import lora_linear_reference
from modxfer_fast.measure.roofline import Work

FLOOR = "frozen linears"
# the widths of each target: from the residual stream to it, or back from the feed-forward width
_TARGETS = {
    "single": (("o", "H", "H"),),
    "qkv": (("q", "H", "H"), ("k", "H", "H_kv"), ("v", "H", "H_kv")),
    "gate_up": (("gate", "H", "F"), ("up", "H", "F")),
    "down": (("down", "F", "H"),),
}


@dataclass(frozen=True)
class Shape(rooms.Sizes):
    """M rows (tokens), H, H_kv and F widths of a layer (heads, key-value heads, feed-forward)."""

    M: int
    H: int
    H_kv: int
    F: int
    R: int = 16


ROOM = rooms.Room(
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


# (x, targets) -> y [M, N] of each
Forward = Callable[[Tensor, list[LoraTarget]], Sequence[Tensor]]
Step = Callable[[], rooms.Results]


@dataclass(frozen=True)
class Problem:
    """Tensors of one case; adapters hold values that every dtype of the case represents."""

    names: tuple[str, ...]
    x: Tensor  # [M, K]
    dys: list[Tensor]  # [M, N] each
    targets: list[LoraTarget]
    dropout: float

    def trained(self, dtype: torch.dtype) -> list[LoraTarget]:
        """The targets with adapters of their own."""
        own = lambda tensor: nn.Parameter(tensor.to(dtype, copy=True))
        return [t._replace(lora_a=own(t.lora_a), lora_b=own(t.lora_b)) for t in self.targets]


def lineup(case: Case) -> Lineup:
    problem = _problem(case)
    masked = functools.partial(_truth, problem, problem.dropout)
    unmasked = functools.partial(_truth, problem, 0.0) if problem.dropout else masked
    candidates, seed = [], lora.seed_on(case.device)

    def add(
        name: str,
        adapters: torch.dtype,
        forward: Forward,
        checked: Forward,
        wrap: Callable[[Step], Step] = lambda step: step,
        **options,
    ) -> None:
        targets = problem.trained(adapters)
        steps = (wrap(_step(problem, targets, function)) for function in (forward, checked))
        candidates.append(_candidate(problem, name, targets, *steps, **options))

    backends = rooms.our_backends("lora_linear", case)
    for backend in backends:
        forward = functools.partial(lora_linear_group, backend=backend)
        checked = functools.partial(forward, seed=seed)
        for adapters in dict.fromkeys((case.dtype, torch.float32)):
            suffix = "" if adapters == case.dtype else ", fp32 adapters"
            add(f"ours {backend}{suffix}", adapters, forward, checked)
    if "triton" in backends:  # what its rule chooses from
        forward = functools.partial(lora_linear_group, backend="triton")
        checked = functools.partial(forward, seed=seed)
        for name, apart in (("base apart", True), ("one kernel", False)):
            wrap = functools.partial(lora.with_base, apart)
            add(f"ours triton, {name}", case.dtype, forward, checked, wrap)
    kinds = [("", case.dtype, False)]
    if case.dtype != torch.float32:  # adapters as PEFT makes them, under AMP and alone, or cast
        kinds = [(", AMP", torch.float32, True), (", fp32 adapters", torch.float32, False)]
        short = {torch.bfloat16: "bf16", torch.float16: "fp16"}[case.dtype]
        kinds.append((f", {short} adapters", case.dtype, False))
    for suffix in ("", ", torch.compile"):
        name = peers.label("peft", "peft") + suffix
        for kind, adapters, amp in kinds:
            candidates.append(_peft(problem, name + kind, adapters, amp, bool(suffix), unmasked))
    without = _addmm(0.0)
    add("addmm function", case.dtype, _addmm(problem.dropout), without, truth=unmasked)
    if problem.dropout > 0.0:
        add("addmm function without dropout", case.dtype, without, without, truth=unmasked)
    outs = "+".join(str(len(target.weight)) for target in problem.targets)
    columns = {
        "M": case.shape.M,
        "K": problem.x.shape[1],
        "N": int(outs) if outs.isdigit() else outs,
        "R": case.shape.R,
        "targets": case.variant,
        "dropout": problem.dropout,
    }
    return Lineup(columns, candidates, {FLOOR: _floor(problem)}, masked, graphs=True)


def _work(problem: Problem) -> Work:
    """Of the formula, one pass over x and dy each."""
    x, flops, bits = problem.x, 0, 0
    (rows, width), elements = x.shape, 3 * x.numel()  # x in both passes, dx
    for weight, lora_a, lora_b, *_ in problem.targets:
        rank, out = len(lora_a), len(weight)
        flops += 4 * rows * width * out + 6 * rows * rank * (width + out)
        adapters = lora_a.numel() + lora_b.numel()
        elements += 2 * weight.numel() + 3 * adapters + 2 * rows * out + 2 * rows * rank
        bits += 2 * x.numel() if problem.dropout > 0.0 else 0
    return Work(flops, x.element_size() * elements + bits // 8)


def _floor(problem: Problem) -> Floor:
    """The frozen linears and the gradient of their input, summed as autograd sums it."""
    x, dys, weights = problem.x, problem.dys, [target.weight for target in problem.targets]
    ys, dx = [torch.empty_like(dy) for dy in dys], torch.empty_like(x)
    part = torch.empty_like(x) if len(dys) > 1 else None

    def frozen() -> None:
        for y, weight in zip(ys, weights, strict=True):
            torch.mm(x, weight.t(), out=y)
        torch.mm(dys[0], weights[0], out=dx)
        for dy, weight in zip(dys[1:], weights[1:], strict=True):
            torch.mm(dy, weight, out=part)
            dx.add_(part)

    flops = sum(4 * len(x) * weight.numel() for weight in weights)
    moved = sum(2 * (x.nbytes + w.nbytes + dy.nbytes) for w, dy in zip(weights, dys, strict=True))
    return Floor(frozen, Work(flops, moved + 3 * x.nbytes * (len(dys) - 1)))


def _candidate(
    problem: Problem,
    name: str,
    targets: list[LoraTarget],
    step: Callable[[], rooms.Results],
    checked: Callable[[], rooms.Results],
    truth: Callable[[], rooms.Results] | None = None,
) -> Candidate:
    weights = [tensor for target in targets for tensor in target[:3]]
    options = {"weights": weights, "budget": BUDGET, "check_step": checked, "truth": truth}
    return Candidate(name, step, FLOOR, _work(problem), **options)


def _addmm(dropout: float) -> Forward:
    def forward(x: Tensor, targets: list[LoraTarget]) -> Sequence[Tensor]:
        flat = [tensor for target in targets for tensor in target[:3]]
        return lora.AddmmLinears.apply(x, SCALING, dropout, *flat)

    return forward


def _peft(
    problem: Problem,
    name: str,
    adapters: torch.dtype,
    amp: bool,
    compiled: bool,
    truth: Callable[[], rooms.Results],
) -> Candidate:
    inject, why_not = peers.peft_inject()
    if inject is None:
        return Candidate(name, None, FLOOR, _work(problem), why_not=why_not)
    targets, module = problem.trained(adapters), nn.Module()
    for target_name, target in zip(problem.names, targets, strict=True):
        linear = nn.Linear(*reversed(target.weight.shape), bias=False, device="meta")
        linear.weight = nn.Parameter(target.weight, requires_grad=False)
        setattr(module, target_name, linear)
    module = inject(module, problem.names, len(targets[0].lora_a), SCALING, problem.dropout)
    layers = [getattr(module, target_name) for target_name in problem.names]
    for layer, target in zip(layers, targets, strict=True):
        layer.lora_A["default"].weight = target.lora_a
        layer.lora_B["default"].weight = target.lora_b

    def linears(x: Tensor) -> list[Tensor]:
        with torch.autocast(x.device.type, dtype=x.dtype, enabled=amp):
            return [layer(x) for layer in layers]

    function = torch.compile(linears, dynamic=False) if compiled else linears
    step = _step(problem, targets, lambda x, _: function(x))
    checked = functools.partial(peers.without_dropout, module, step)
    return _candidate(problem, name, targets, step, checked, truth)


def _step(
    problem: Problem, targets: list[LoraTarget], forward: Forward
) -> Callable[[], rooms.Results]:
    x = problem.x.detach().requires_grad_()
    leaves = {"dx": x}
    for name, target in zip(problem.names, targets, strict=True):
        leaves |= {f"da_{name}": target.lora_a, f"db_{name}": target.lora_b}
    outputs = [f"y_{name}" for name in problem.names]
    return rooms.training_step(lambda: forward(x, targets), leaves, outputs, problem.dys)


def _problem(case: Case) -> Problem:
    """Unit x and dy, weights that keep the scale, and a LoRA part as large as the base's."""
    shape, randn, dropout = case.shape, rooms.Normal(case.device), lora.dropout_of(case)
    names, widths, outs = zip(*_TARGETS[case.variant], strict=True)
    width, outs = getattr(shape, widths[0]), [getattr(shape, out) for out in outs]
    scaled = lambda *size, factor=1.0: randn(*size).mul_(factor).to(case.dtype)
    x = scaled(shape.M, width)
    dys = [scaled(shape.M, out) for out in outs]
    weights = [scaled(out, width, factor=width**-0.5) for out in outs]
    lora_a = [scaled(shape.R, width, factor=width**-0.5) for _ in outs]
    lora_b = [scaled(out, shape.R, factor=shape.R**-0.5 / SCALING) for out in outs]
    targets = [
        LoraTarget(*tensors, SCALING, dropout=dropout)
        for tensors in zip(weights, lora_a, lora_b, strict=True)
    ]
    return Problem(names, x, dys, targets, dropout)


def _truth(problem: Problem, dropout: float) -> rooms.Results:
    """In fp64, by autograd through the definition."""
    dys = [dy.double() for dy in problem.dys]
    wide = dataclasses.replace(problem, x=problem.x.double(), dys=dys)
    targets = [t._replace(weight=t.weight.double()) for t in problem.trained(torch.float64)]
    masks = lora.masks(problem.x, dropout, len(targets))
    return _step(wide, targets, functools.partial(lora_linear_reference, masks=masks))()

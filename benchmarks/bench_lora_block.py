"""A decoder layer of Llama with LoRA, forward and backward: over the same layer frozen.

B sequences   T tokens each   M = B T   H, H_kv, F widths   R rank   b bytes an element
FLOPs of the frozen layer: 4 M K N a linear (y and dx), 6 B T^2 H of causal attention (two products
forward, four backward, half of each). Of the formula: 6 M R (K + N) more for each target.
Bytes: every weight is read by both passes, x by both, dy read, y and dx written; each adapter is
read by both and its gradient written. What the layer keeps in between is not counted.

The floors are the layer without adapters, by autograd and compiled like the others: a ratio to one
is one plus the overhead of LoRA. PEFT and our op draw different masks, so that all are checked in
evaluation mode, without dropout, and timed in training mode.
"""

import copy
import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import peers, rooms
from benchmarks.lora import SCALING
from benchmarks.rooms import Candidate, Case, Floor, Lineup
from modxfer_fast.kernels import dispatch
from modxfer_fast.measure.roofline import Work

FLOOR, COMPILED_FLOOR = "frozen block", "frozen block, torch.compile"
# half precision rounds every activation between two linears, for the frozen layer as for all
BUDGET = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_TARGETS = {
    "all-linear": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "q-v": ("q_proj", "v_proj"),
}


@dataclass(frozen=True)
class Shape(rooms.Sizes):
    """B sequences of T tokens, widths of heads, key-value heads and feed-forward, D_head each."""

    B: int
    T: int
    H: int
    H_kv: int
    F: int
    D_head: int = 128
    R: int = 16


ROOM = rooms.Room(
    shapes={
        "smoke": Shape(2, 16, 64, 32, 96, 16, 8),
        "cpu-gate": Shape(4, 512, 512, 128, 1408, 64),
        "llama3-8b": Shape(2, 4096, 4096, 1024, 14336),
        "qwen2.5-1.5b": Shape(2, 4096, 1536, 256, 8960),
        "llama3-1b": Shape(2, 4096, 2048, 512, 8192, 64),
    },
    default_shape={"cpu": "cpu-gate", "cuda": "llama3-8b"},
    axis="targets",
    variants=tuple(_TARGETS),
    options={"dropout": 0.1},
)


class Block(NamedTuple):
    """A frozen layer and the tensors of one step; rotary: cos and sin [1, T, D_head]."""

    layer: nn.Module
    rotary: tuple[Tensor, Tensor]
    x: Tensor  # [B, T, H]
    dy: Tensor  # [B, T, H]


def lineup(case: Case) -> Lineup:
    inject, why_not = peers.peft_inject()
    if inject is None:
        raise peers.MissingPackage(f"lora_block: expected PEFT to be installed, it is {why_not}")
    if importlib.util.find_spec("pydantic") is None:
        raise peers.MissingPackage(
            "lora_block: expected what patch_peft_model needs, pip install 'modxfer-fast[engine]'; "
            "pydantic is not installed"
        )
    block = _block(case)
    with_lora = functools.partial(_with_lora, case, block, inject)
    # the patch leaves layers to PEFT rather than to plain PyTorch
    backends = [name for name in rooms.our_backends("lora_linear", case) if name != "reference"]
    candidates = []
    for adapters in dict.fromkeys((torch.float32, case.dtype)):
        for backend in (*backends, None):
            amp = adapters != case.dtype
            candidates += _candidates(case, block, with_lora(adapters), amp, backend)
    functions = {FLOOR: block.layer, COMPILED_FLOOR: torch.compile(block.layer, dynamic=False)}
    weights = list(block.layer.parameters())
    floors = {
        name: Floor(_step(block, block.layer, function), _work(case), weights)
        for name, function in functions.items()
    }
    truth = lambda: _truth(block, with_lora(torch.float64))
    return Lineup(ROOM.problem(case), candidates, floors, truth, graphs=True)


def _work(case: Case, targets: tuple[str, ...] = ()) -> Work:
    """Of the layer with these targets."""
    shape = case.shape
    rows = shape.B * shape.T
    flops = 6 * rows * shape.T * shape.H
    elements = 5 * rows * shape.H
    for name, (width, out) in _widths(shape).items():
        flops += 4 * rows * width * out
        elements += 2 * width * out
        if name in targets:
            flops += 6 * rows * shape.R * (width + out)
            elements += 3 * shape.R * (width + out)
    return Work(flops, case.dtype.itemsize * elements)


def _widths(shape: Shape) -> dict[str, tuple[int, int]]:
    """Input and output width of each linear."""
    h, h_kv, f = shape.H, shape.H_kv, shape.F
    return {
        "q_proj": (h, h),
        "k_proj": (h, h_kv),
        "v_proj": (h, h_kv),
        "o_proj": (h, h),
        "gate_proj": (h, f),
        "up_proj": (h, f),
        "down_proj": (f, h),
    }


def _candidates(
    case: Case, block: Block, layer: nn.Module, amp: bool, backend: str | None
) -> list[Candidate]:
    """The layer eager and compiled: on our op with that backend, or as PEFT runs it."""
    name = f"ours {backend}" if backend else peers.label("peft", "peft")
    name += ", AMP" if amp else ""
    why_not = _fuse(layer, backend) if backend else ""
    candidates = []
    # compiled once: adapters in the layer's dtype leave the compiler the fewest casts
    for suffix in ("",) if amp else ("", ", torch.compile"):
        function = torch.compile(layer, dynamic=False) if suffix else layer
        step = _step(block, layer, function, amp, backend)
        candidates.append(
            Candidate(
                name + suffix,
                None if why_not else step,
                COMPILED_FLOOR if suffix else FLOOR,
                _work(case, _TARGETS[case.variant]),
                weights=list(layer.parameters()),
                budget=BUDGET,
                check_step=functools.partial(peers.without_dropout, layer, step),
                why_not=why_not,
            )
        )
    return candidates


def _fuse(layer: nn.Module, backend: str) -> str:
    """Patches the layer; the reason why one of its linears is left to PEFT, or nothing."""
    from modxfer_fast import patch_peft_model

    with dispatch.use_backend(backend):
        report = patch_peft_model(layer)
    return f"left to PEFT: {report.declined[0][1]}" if report.declined else ""


def _step(
    block: Block,
    layer: nn.Module,
    function: Callable[..., Tensor],
    amp: bool = False,
    backend: str | None = None,
) -> Callable[[], rooms.Results]:
    """Forward and backward of `function`, the layer or its compiled form."""
    x = block.x.detach().requires_grad_()

    def forward() -> Tensor:
        with (
            dispatch.use_backend(backend),
            torch.autocast(x.device.type, dtype=x.dtype, enabled=amp),
        ):
            return function(x, position_embeddings=block.rotary)

    return rooms.training_step(forward, {"dx": x, **_adapters(layer)}, ("y",), (block.dy,))


def _adapters(layer: nn.Module) -> dict[str, Tensor]:
    """Trainable parameters by the name of their gradient: da_q_proj, db_q_proj, ..."""
    adapters = {}
    for name, parameter in layer.named_parameters():
        if parameter.requires_grad:
            linear, part, _, _ = name.split(".")[-4:]  # q_proj.lora_A.default.weight
            adapters[f"d{part[-1].lower()}_{linear}"] = parameter
    return adapters


def _block(case: Case) -> Block:
    """A layer whose linears keep the scale of a unit input."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    shape, randn = case.shape, rooms.Normal(case.device)
    if shape.H % shape.D_head or shape.H_kv % shape.D_head:
        raise ValueError(
            f"D_head: expected a divisor of H={shape.H} and H_kv={shape.H_kv}, got {shape.D_head}"
        )
    config = LlamaConfig(
        hidden_size=shape.H,
        intermediate_size=shape.F,
        num_attention_heads=shape.H // shape.D_head,
        num_key_value_heads=shape.H_kv // shape.D_head,
        head_dim=shape.D_head,
        attn_implementation="sdpa",
    )
    layer = LlamaDecoderLayer(config, layer_idx=0).to(case.device)
    with torch.no_grad():
        for name, (width, out) in _widths(shape).items():
            _linear(layer, name).weight.copy_(randn(out, width).mul_(width**-0.5))
    layer = layer.to(case.dtype).requires_grad_(False).train()
    x, dy = (randn(shape.B, shape.T, shape.H).to(case.dtype) for _ in range(2))
    positions = torch.arange(shape.T, device=case.device)[None]
    rotary = LlamaRotaryEmbedding(config).to(case.device)(x, positions)
    return Block(layer, rotary, x, dy)


def _with_lora(
    case: Case, block: Block, inject: Callable[..., nn.Module], adapters: torch.dtype
) -> nn.Module:
    """The layer with PEFT's adapters; weights of the frozen linears are shared, not copied.

    Adapters are the same numbers in every dtype, and as large a part of the output as the base.
    """
    shape, randn = case.shape, rooms.Normal(case.device, seed=1)
    memo = {id(parameter): parameter for parameter in block.layer.parameters()}
    layer = copy.deepcopy(block.layer, memo)
    targets = _TARGETS[case.variant]
    layer = inject(layer, targets, shape.R, SCALING, case.options["dropout"])
    for name in targets:
        width, out = _widths(shape)[name]
        linear = _linear(layer, name)
        for part, values in (
            (linear.lora_A, randn(shape.R, width).mul_(width**-0.5)),
            (linear.lora_B, randn(out, shape.R).mul_(shape.R**-0.5 / SCALING)),
        ):
            values = values.to(case.dtype).to(adapters)
            part["default"].weight = nn.Parameter(values)
    return layer.train()


def _linear(layer: nn.Module, name: str) -> nn.Module:
    return getattr(layer.self_attn if hasattr(layer.self_attn, name) else layer.mlp, name)


def _truth(block: Block, layer: nn.Module) -> rooms.Results:
    """In fp64 by PEFT's own forward, a sequence at a time: attention is [heads, T, T] there.

    The norms of transformers compute in fp32 whatever they are given.
    """
    layer = copy.deepcopy(layer).double().eval()
    rotary = tuple(part.double() for part in block.rotary)
    parts = [
        _step(Block(layer, rotary, x, dy), layer, layer)()
        for x, dy in zip(block.x.double().split(1), block.dy.double().split(1), strict=True)
    ]
    join = lambda name: torch.cat if name in ("y", "dx") else sum
    return {name: join(name)([part[name] for part in parts]) for name in parts[0]}

"""Small models with LoRA for the tests of the fused layers, and a look at what the op is given."""

import contextlib
import copy
from collections.abc import Iterator

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
    XLMRobertaConfig,
)

from modxfer_fast.kernels import dispatch
from modxfer_fast.kernels.lora_linear import op
from modxfer_fast.testing.accuracy import assert_within_budget

VOCAB_SIZE = 61
SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.1,
}
DECODER = {"num_key_value_heads": 2, "head_dim": 8, "bos_token_id": 1, "eos_token_id": 2}
DECODER_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ENCODER_TARGETS = ["query", "key", "value", "dense"]
ENCODER = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
# Gemma 3 keeps attention scores apart from the usual 1/sqrt(head_dim)
CONFIGS = {
    "llama": lambda: LlamaConfig(**SIZES, **DECODER, pad_token_id=0),
    "qwen2": lambda: Qwen2Config(**SIZES, **DECODER, pad_token_id=0),
    "qwen3": lambda: Qwen3Config(**SIZES, **DECODER, pad_token_id=0),
    "mistral": lambda: MistralConfig(**SIZES, **DECODER, pad_token_id=0),
    "gemma": lambda: GemmaConfig(**SIZES, **DECODER),
    "gemma2": lambda: Gemma2Config(**SIZES, **DECODER, query_pre_attn_scalar=8),
    "gemma3": lambda: Gemma3TextConfig(**SIZES, **DECODER, query_pre_attn_scalar=8),
    "bert": lambda: BertConfig(**SIZES, **ENCODER),
    "roberta": lambda: RobertaConfig(**SIZES, **ENCODER, pad_token_id=0),
    "xlm_roberta": lambda: XLMRobertaConfig(**SIZES, **ENCODER, pad_token_id=0),
}
ENCODERS = ("bert", "roberta", "xlm_roberta")


def base_model(family: str = "llama", **config) -> nn.Module:
    """Two layers, 32 wide, the same weights every time."""
    auto = AutoModelForMaskedLM if family in ENCODERS else AutoModelForCausalLM
    made = CONFIGS[family]()
    for name, value in config.items():
        setattr(made, name, value)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return auto.from_config(made, dtype=torch.float32)


def lora_config(family: str = "llama", **options) -> LoraConfig:
    """B is not zero: with the usual zero the first gradient of A would be."""
    options = {"r": 4, "lora_alpha": 8, "init_lora_weights": False, **options}
    options.setdefault("target_modules", ENCODER_TARGETS if family in ENCODERS else DECODER_TARGETS)
    return LoraConfig(**options)


def lora_model(family: str = "llama", model: dict | None = None, **options) -> nn.Module:
    """A PeftModel with the same adapters every time."""
    base = base_model(family, **(model or {}))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return get_peft_model(base, lora_config(family, **options))


def ids(rows: int = 2, length: int = 9, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB_SIZE, (rows, length), generator=generator)


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy in the dtype of the logits, where transformers' own is always in fp32."""
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def outputs_and_gradients(model: nn.Module, batch: Tensor | None = None) -> dict[str, Tensor]:
    """Logits and the gradient of every trainable parameter, of a loss over all labels."""
    batch = ids() if batch is None else batch
    model.zero_grad(set_to_none=True)
    logits = model(input_ids=batch, attention_mask=torch.ones_like(batch)).logits
    loss_of(logits, batch).backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **found}


def assert_same_results(model: nn.Module, plain: nn.Module, batch: Tensor | None = None) -> None:
    """Results of `model` are as near to those of `plain` in fp64 as `plain`'s own are.

    Some norms and softmaxes of transformers compute in fp32 in every model; the linears do not.
    Without a batch there are four: the errors of a single one are a draw of roundings that pass
    through all layers, in which either side is now and then lucky by a factor.
    """
    batches = [ids(seed=seed) for seed in range(4)] if batch is None else [batch]

    def results(model: nn.Module) -> dict[str, Tensor]:
        found = [outputs_and_gradients(model, each) for each in batches]
        return {name: torch.stack([each[name] for each in found]) for name in found[0]}

    assert_all_within_budget(results(model), results(copy.deepcopy(plain).double()), results(plain))


def assert_all_within_budget(
    got: dict[str, Tensor], truth: dict[str, Tensor], yardstick: dict[str, Tensor]
) -> None:
    """Logits and gradients of one backward, each within its budget."""
    assert got.keys() == truth.keys()
    # the softmaxes and norms on the way subtract terms as large as the largest gradient
    through = max(value.abs().max().item() for name, value in truth.items() if name != "logits")
    for name, expected in truth.items():
        assert expected.abs().max() > 0, f"{name} is zero, which tells nothing"
        assert got[name].dtype == yardstick[name].dtype
        scale = 0.0 if name == "logits" else through
        assert_within_budget(got[name], expected, yardstick[name], name, scale)


@contextlib.contextmanager
def fused_backend() -> Iterator[None]:
    """The automatic backend, or where it would leave all to PEFT the reference."""
    fast, _ = dispatch.accelerated("lora_linear", "cpu", (torch.float32, torch.float32))
    with dispatch.use_backend(None if fast else "reference"):
        yield


@contextlib.contextmanager
def calls_of_the_op() -> Iterator[list[dict]]:
    """What each call of the op was given: scalings and dropouts of its targets, and whether the
    base was part of it."""
    calls, apply = [], op._LoraLinear.apply

    def record(x, seed, options, *tensors):
        count = len(options.scalings)
        calls.append(
            {
                "size": count,
                "scalings": options.scalings,
                "dropouts": options.dropouts,
                "with_base": [weight is not None for weight in tensors[:count]],
            }
        )
        return apply(x, seed, options, *tensors)

    op._LoraLinear.apply = record
    try:
        yield calls
    finally:
        op._LoraLinear.apply = apply


def sizes(calls: list[dict]) -> list[int]:
    return sorted(call["size"] for call in calls)

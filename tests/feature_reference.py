"""Distillation from hidden states and relations written out by hand, in any precision."""

import contextlib
import copy
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modxfer_fast.config import HiddenStatesSection, RelationsSection
from tests.support.reference import dense_loss, dense_terms


@contextlib.contextmanager
def states_of(model: nn.Module) -> Iterator[tuple[dict, dict]]:
    """{layer: [B, T, D]} and {block: {"q", "k", "v": [B, T, H]}} of one call of a Llama."""
    hidden, qkv, hooks = {}, {}, []
    decoder = model.get_decoder() if not hasattr(model, "peft_config") else model.model.model

    def keep(where, key):
        return lambda module, args, output: where.__setitem__(key, output)

    hooks.append(decoder.embed_tokens.register_forward_hook(keep(hidden, 0)))
    for number, block in enumerate(decoder.layers, 1):
        hooks.append(block.register_forward_hook(keep(hidden, number)))
        qkv[number] = {}
        for name in "qkv":
            linear = getattr(block.self_attn, f"{name}_proj")
            hooks.append(linear.register_forward_hook(keep(qkv[number], name)))
    yield hidden, qkv
    for hook in hooks:
        hook.remove()


def hidden_sums(
    student: dict[int, Tensor],
    teacher: dict[int, Tensor],
    projections: dict[str, Tensor],
    mask: Tensor,
    options: HiddenStatesSection,
) -> list[Tensor]:
    """Loss of each pair, "mse" or "cosine", summed over the tokens of `mask`."""
    sums = []
    for s, t in sorted(options.layers.items()):
        name = "shared" if options.shared else f"{s}_{t}"
        z = student[s]
        for part in ("weight", "down", "up"):
            if f"{name}.{part}" in projections:
                z = z @ projections[f"{name}.{part}"].T
        if f"{name}.bias" in projections:
            z = z + projections[f"{name}.bias"]
        target = teacher[t]
        if options.norm == "rms":
            z, target = (x / (x.square().mean(-1, True) + 1e-6).sqrt() for x in (z, target))
        if options.loss == "cosine":
            rows = 1 - F.cosine_similarity(z, target, dim=-1)
        else:
            rows = (z - target).square().mean(-1)
        sums.append(rows[mask].sum())
    return sums


def relation_sums(student, teacher, mask: Tensor, options: RelationsSection) -> list[Tensor]:
    """MiniLMv2 loss of each pair, causal, summed over the tokens of `mask`."""
    seen = torch.ones(mask.shape[1], mask.shape[1], dtype=torch.bool).tril() & mask[:, None, :]
    seen = (seen | torch.eye(mask.shape[1], dtype=torch.bool))[:, None]

    def log_relation(x: Tensor) -> Tensor:
        x = x.unflatten(-1, (options.num_heads, -1)).transpose(1, 2)
        logits = (x @ x.mT / math.sqrt(x.shape[-1])).masked_fill(~seen, -1e9)
        return logits.log_softmax(-1)

    sums = []
    for s, t in sorted(options.layers.items()):
        total = 0.0
        for name in "qkv":
            log_p, log_q = log_relation(teacher[t][name]), log_relation(student[s][name])
            rows = (log_p.exp() * (log_p - log_q)).sum(-1).mean(1)
            total = total + rows[mask].sum()
        sums.append(total)
    return sums


def token_mask(batch: dict, tokens: str = "all") -> Tensor:
    return batch["attention_mask"].bool() if tokens == "all" else batch["labels"] != -100


def batch_terms(student, teacher, projections, batch, objective, hidden, relations) -> dict:
    """Sums over one batch: kd, ce, and the pairs of hidden states and relations."""
    with states_of(student) as (s_hidden, s_qkv), states_of(teacher) as (t_hidden, t_qkv):
        kd, ce, labels = dense_terms(student, teacher, batch, objective)
    terms = {"kd": kd, "ce": ce, "labels": labels, "hidden": [], "relation": []}
    if hidden is not None:
        mask = token_mask(batch, hidden.tokens)
        terms["hidden"] = hidden_sums(s_hidden, t_hidden, projections, mask, hidden)
        terms["hidden_tokens"] = mask.sum()
    if relations is not None:
        mask = token_mask(batch)
        terms["relation"] = relation_sums(s_qkv, t_qkv, mask, relations)
        terms["relation_tokens"] = mask.sum()
    return terms


def weighted(sums: list[Tensor], options) -> Tensor:
    """The term of a loss: weighted mean over its pairs."""
    layers = sorted(options.layers)
    weight = options.weight
    weights = [weight[s] if isinstance(weight, dict) else weight for s in layers]
    return sum(w * x for w, x in zip(weights, sums, strict=True)) / len(sums)


def train_dense_features(
    student: nn.Module,
    teacher: nn.Module,
    projections: dict[str, Tensor],
    steps: list[dict],
    objective,
    hidden: HiddenStatesSection | None,
    relations: RelationsSection | None,
    learning_rate: float,
    dtype: torch.dtype,
) -> tuple[nn.Module, dict[str, Tensor]]:
    """Trained copies of student and projections: plain SGD, one batch of everything a step."""
    student = copy.deepcopy(student).to(dtype).train()
    teacher = copy.deepcopy(teacher).to(dtype).eval()
    projections = {k: v.detach().clone().to(dtype).requires_grad_() for k, v in projections.items()}
    own = learning_rate if hidden is None else hidden.learning_rate or learning_rate
    groups = [{"params": [p for p in student.parameters() if p.requires_grad]}]
    if projections:
        groups.append({"params": list(projections.values()), "lr": own})
    optimizer = torch.optim.SGD(groups, lr=learning_rate)
    for batch in steps:
        terms = batch_terms(student, teacher, projections, batch, objective, hidden, relations)
        loss = dense_loss(terms["kd"], terms["ce"], objective) / terms["labels"]
        for kind, options in (("hidden", hidden), ("relation", relations)):
            if options is not None:
                loss = loss + weighted(terms[kind], options) / terms[f"{kind}_tokens"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return student, projections


@torch.no_grad()
def evaluate_dense_features(
    student, teacher, projections, rows, collate, objective, hidden, relations
) -> dict[str, float]:
    """Means over all tokens of `rows`, in fp64, under the names of the trainer's metrics."""
    student = copy.deepcopy(student).double().eval()
    teacher = copy.deepcopy(teacher).double().eval()
    projections = {k: v.double() for k, v in projections.items()}
    terms = batch_terms(student, teacher, projections, collate(rows), objective, hidden, relations)
    kd, ce = terms["kd"] / terms["labels"], terms["ce"] / terms["labels"]
    means = {"kd": kd.item(), "ce": ce.item(), "loss": dense_loss(kd, ce, objective).item()}
    for kind, options in (("hidden", hidden), ("relation", relations)):
        if options is None:
            continue
        sums = [x / terms[f"{kind}_tokens"] for x in terms[kind]]
        means[f"{kind}_loss"] = weighted(sums, options).item()
        means["loss"] += means[f"{kind}_loss"]
        for (s, t), value in zip(sorted(options.layers.items()), sums, strict=True):
            means[f"{kind}_{s}_{t}"] = value.item()
    return means

"""Heads that FSDP2 and tensor-parallel DTensors keep in parts, on ranks.

Each is compared with plain PyTorch on the whole head: of FSDP2 with what FSDP2 itself makes of it.
"""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from modxfer_fast import LinearKDLoss, LoraWeight, VocabParallelWeight, linear_kd_loss
from tests.kernels.test_parallel_heads_distributed import on_ranks, randn

V, D, N = 13, 6, 10
TEACHER = {"teacher_hidden": randn(N, 4, seed=1), "teacher_weight": randn(V, 4, seed=2)}
LABELS = (torch.arange(N) * 5) % V
LABELS[::4] = -100


def plain_loss(logits: Tensor, rank: int = 0) -> Tensor:
    """forward KL + CE / 2 of the rows of this rank, by autograd."""
    z_t = (TEACHER["teacher_hidden"] + rank) @ TEACHER["teacher_weight"].T
    kd = (z_t.softmax(-1) * (z_t.log_softmax(-1) - logits.log_softmax(-1))).sum(-1)
    counts = LABELS != -100
    ce = nn.functional.cross_entropy(logits, LABELS, reduction="none", ignore_index=-100)
    return (kd + 0.5 * ce)[counts].mean()


def our_loss(hidden: Tensor, head: nn.Linear, weight=None, rank: int = 0, **options) -> Tensor:
    loss = LinearKDLoss(ce_weight=0.5)
    return loss(
        *(hidden, head.weight if weight is None else weight),
        *(TEACHER["teacher_hidden"] + rank, TEACHER["teacher_weight"]),
        student_bias=head.bias,
        labels=LABELS,
        **options,
    )


def head_and_states() -> tuple[nn.Linear, Tensor]:
    head = nn.Linear(D, V)
    with torch.no_grad():
        head.weight.copy_(randn(V, D, seed=3))
        head.bias.copy_(randn(V, seed=4))
    return head, randn(N, D, seed=5)


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-6)


def _same_as_fsdp(mesh) -> None:
    """Ranks have other tokens; loss, gradients and placements are those that FSDP2 gives."""
    rank, results = dist.get_rank(), []
    for is_ours in (False, True):
        head, hidden = head_and_states()
        fully_shard(head, mesh=mesh)
        hidden = (hidden + rank).requires_grad_()
        loss = our_loss(hidden, head, rank=rank) if is_ours else plain_loss(head(hidden), rank)
        loss.backward()
        grads = head.weight.grad, head.bias.grad
        for parameter, grad in zip((head.weight, head.bias), grads, strict=True):
            assert isinstance(grad, DTensor)
            assert grad.placements == parameter.placements
            assert grad.to_local().shape == parameter.to_local().shape
        results.append([loss, hidden.grad, *(grad.full_tensor() for grad in grads)])
    for one, other in zip(*results, strict=True):
        close(one, other)


def fsdp() -> None:
    _same_as_fsdp(init_device_mesh("cpu", (dist.get_world_size(),)))


def hybrid() -> None:
    _same_as_fsdp(init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))


def fsdp_per_token() -> None:
    """reduction="none", whose backward runs the loop again, and a teacher that is sharded."""
    rank, mesh = dist.get_rank(), init_device_mesh("cpu", (dist.get_world_size(),))
    head, hidden = head_and_states()
    whole = copy.deepcopy(head)
    fully_shard(head, mesh=mesh)
    teacher = nn.Linear(4, V, bias=False)
    with torch.no_grad():
        teacher.weight.copy_(TEACHER["teacher_weight"])
    fully_shard(teacher, mesh=mesh)
    results = []
    for each, weight in ((whole, TEACHER["teacher_weight"]), (head, teacher.weight)):
        rows = linear_kd_loss(
            *(hidden + rank, each.weight, TEACHER["teacher_hidden"], weight),
            student_bias=each.bias,
            reduction="none",
        )
        rows.square().sum().backward()
        results.append((rows, each.weight.grad, each.bias.grad))
    (rows, *grads), (sharded_rows, *sharded) = results
    close(sharded_rows, rows)
    for one, other in zip(grads, sharded, strict=True):
        dist.all_reduce(one)
        close(other.full_tensor(), one / dist.get_world_size())


def fsdp_lora() -> None:
    """Of a LoRA with its frozen weight, all sharded."""
    rank, mesh = dist.get_rank(), init_device_mesh("cpu", (dist.get_world_size(),))
    tensors = {"weight": randn(V, D, seed=3), "a": randn(2, D, seed=6), "b": randn(V, 2, seed=7)}
    results = []
    for is_sharded in (False, True):
        module = nn.ParameterDict({k: nn.Parameter(t.clone()) for k, t in tensors.items()})
        module["weight"].requires_grad_(False)
        if is_sharded:
            fully_shard(module, mesh=mesh)
        weight = LoraWeight(module["weight"], module["a"], module["b"], 0.5)
        loss = linear_kd_loss(randn(N, D, seed=5) + rank, weight, **TEACHER)
        loss.backward()
        results.append((loss, module["a"].grad, module["b"].grad))
    (loss, *grads), (sharded_loss, *sharded) = results
    close(sharded_loss, loss)
    for one, other in zip(grads, sharded, strict=True):
        dist.all_reduce(one)
        close(other.full_tensor(), one / dist.get_world_size())


def _same_tokens(head: nn.Linear, hidden, weight=None, rank: int = 0, groups: int = 1) -> None:
    """Loss and gradients are those of the whole head, averaged over groups of other tokens."""
    whole, states = head_and_states()
    loss = our_loss(hidden, head, weight, rank)
    loss.backward()
    expected = [torch.zeros_like(whole.weight), torch.zeros_like(whole.bias)]
    for group in range(groups):
        leaf = (states + group).requires_grad_()
        value = plain_loss(whole(leaf), group)
        grads = torch.autograd.grad(value, (whole.weight, whole.bias, leaf))
        for total, grad in zip(expected, grads, strict=False):
            total += grad / groups
        if group == rank:
            close(loss.detach(), value.detach())
            got = hidden.grad.full_tensor() if isinstance(hidden, DTensor) else hidden.grad
            close(got, grads[2])
    for parameter, grad in zip((head.weight, head.bias), expected, strict=True):
        assert parameter.grad.placements == parameter.placements
        close(parameter.grad.full_tensor(), grad)


def tensor_parallel() -> None:
    """A ColwiseParallel head by the name of its mesh, by the word of the user, by its states."""
    named = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    unnamed = init_device_mesh("cpu", (dist.get_world_size(),))
    for how in ("name", "word", "states", "sequence"):
        mesh = unnamed if how in ("word", "states") else named
        head, hidden = head_and_states()
        parallelize_module(head, mesh, ColwiseParallel())
        weight = None
        if how == "word":
            weight = VocabParallelWeight(head.weight)
        if how == "states":
            hidden = DTensor.from_local(hidden, mesh)
        if how == "sequence":
            hidden = DTensor.from_local(hidden, mesh).redistribute(placements=[Shard(0)])
        hidden = hidden.detach().requires_grad_()
        _same_tokens(head, hidden, weight)


def fsdp_of_tensor_parallel() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    head, hidden = head_and_states()
    parallelize_module(head, mesh["tp"], ColwiseParallel())
    fully_shard(head, mesh=mesh["dp"])
    rank = mesh.get_local_rank("dp")
    _same_tokens(head, (hidden + rank).requires_grad_(), None, rank, 2)


CASES = {
    2: ["fsdp", "fsdp_per_token", "fsdp_lora", "tensor_parallel"],
    4: ["hybrid", "fsdp_of_tensor_parallel"],
}


def run(names: list[str]) -> list:
    return on_ranks(lambda name: globals()[name](), names)


@pytest.fixture(scope="module")
def outcomes(ranks, four_ranks):
    found = {}
    for group in (ranks, four_ranks):
        names = CASES[group.world_size]
        results = group.run(run, names, timeout=240)
        found |= {name: [rank[i] for rank in results] for i, name in enumerate(names)}
    return found


@pytest.mark.parametrize("name", [name for names in CASES.values() for name in names])
def test_a_head_in_parts(name, outcomes):
    for rank, outcome in enumerate(outcomes[name]):
        assert outcome is None, f"rank {rank}: {outcome}"

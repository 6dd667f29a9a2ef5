"""Heads that FSDP2, tensor-parallel DTensors and ZeRO-3 keep in parts, on ranks.

Each is compared with plain PyTorch on the whole head: of FSDP2 and of ZeRO-3 with what they make of
it themselves.
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


def our_loss(hidden: Tensor, head: nn.Linear, weight=None, rank: int = 0, teacher=None) -> Tensor:
    loss = LinearKDLoss(ce_weight=0.5)
    teacher = TEACHER["teacher_weight"] if teacher is None else teacher
    return loss(
        *(hidden, head.weight if weight is None else weight),
        *(TEACHER["teacher_hidden"] + rank, teacher),
        student_bias=head.bias,
        labels=LABELS,
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


class WithHead(nn.Module):
    """A student whose head is called, or read by the loss alone, beside the head of a teacher."""

    def __init__(self, is_tied: bool, is_called: bool):
        super().__init__()
        self.is_called = is_called
        self.embeddings = nn.Embedding(V, D)
        self.body = nn.Linear(D, D, bias=False)
        self.head, _ = head_and_states()
        self.teacher = nn.Linear(4, V, bias=False).requires_grad_(False)
        with torch.no_grad():
            self.embeddings.weight.copy_(randn(V, D, seed=9))
            self.body.weight.copy_(randn(D, D, seed=8))
            self.teacher.weight.copy_(TEACHER["teacher_weight"])
        if is_tied:
            self.embeddings.weight = self.head.weight

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.body(self.embeddings(ids))
        return self.head(hidden) if self.is_called else hidden


def _statuses(model: WithHead) -> set[str]:
    """Of parameters that no module but the head has."""
    return {p.ds_status.name for p in (model.head.bias, model.teacher.weight)}


def _same_as_zero3(is_tied: bool) -> None:
    """Two steps leave the parameters as DeepSpeed does where it calls the head.

    The engine keeps tied embeddings whole from the first step on.
    """
    from modxfer_fast.engine.deepspeed import start  # seconds of import, which few ranks need

    start(use_cpu=True)
    import deepspeed

    rank = dist.get_rank()
    config = {
        "train_micro_batch_size_per_gpu": N,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,  # its default clips the norm of all gradients to 1
    }
    results = []
    for is_ours in (False, True):
        model = WithHead(is_tied, is_called=not is_ours)
        trained = [p for p in model.parameters() if p.requires_grad]
        initial = [p.detach().clone() for p in trained]
        sgd = torch.optim.SGD(trained, lr=1.0)
        engine, *_ = deepspeed.initialize(model=model, optimizer=sgd, config=config)
        losses = []
        for _ in range(2):
            out = engine((torch.arange(N) * 3 + rank) % V)
            if is_ours:
                assert _statuses(model) == {"NOT_AVAILABLE"}
                loss = our_loss(out, model.head, rank=rank, teacher=model.teacher.weight)
            else:
                loss = plain_loss(out, rank)
            engine.backward(loss)
            assert _statuses(model) == {"NOT_AVAILABLE"}
            engine.step()
            losses.append(loss.detach())
        with deepspeed.zero.GatheredParameters(trained):
            results.append(losses + [p.detach().clone() for p in trained])
    for one, other in zip(*results, strict=True):
        close(one, other)
    for one, other in zip(initial, results[0][2:], strict=True):
        assert (one - other).abs().max() > 0.01


def zero3() -> None:
    _same_as_zero3(is_tied=False)


def zero3_tied() -> None:
    _same_as_zero3(is_tied=True)


CASES = {
    2: ["fsdp", "fsdp_per_token", "fsdp_lora", "tensor_parallel", "zero3", "zero3_tied"],
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

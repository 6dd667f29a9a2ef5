"""Fused LoRA layers under ZeRO, DDP and FSDP on two ranks equal plain PEFT in one process.

Under ZeRO and DDP trained adapters are compared with a run in fp64; all these cells run in one
launch. Under FSDP outputs and gradients are compared, in another.
"""

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from peft import LoraConfig, PeftModel, get_peft_model
from torch.distributed import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from modxfer_fast.engine import DistillTrainer, Objective
from modxfer_fast.engine.deepspeed import zero_config
from modxfer_fast.models import patch_peft_model, register_fused_lora
from tests.fused_lora_models import (
    assert_all_within_budget,
    calls_of_the_op,
    fused_backend,
    lora_model,
    outputs_and_gradients,
    sizes,
)
from tests.support.models import TokenDataset, align_collate, tiny_llama
from tests.support.plain_sgd import plain_sgd
from tests.support.reference import train_dense

STEPS, ACCUMULATION, BATCH, RANKS = 3, 2, 2, 2
LEARNING_RATE = 0.5
OBJECTIVE = Objective(kd_weight=0.0, ce_weight=1.0)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclasses.dataclass(frozen=True)
class Cell:
    stage: int | None  # None: plain DDP
    checkpointing: str | None = None
    student_on_disk: bool = True  # else patched first, and partitioned by DeepSpeed afterwards
    registered: bool = False  # fused by the configuration instead of a patch
    persistence: int = 0  # at 0 adapters are partitioned too

    @property
    def name(self) -> str:
        parts = ["ddp" if self.stage is None else f"zero{self.stage}", self.checkpointing or ""]
        parts += ["built"] * (not self.student_on_disk) + ["registered"] * self.registered
        parts += ["persistent"] * bool(self.persistence)
        return "-".join(part for part in parts if part)


CELLS = [
    Cell(None),
    Cell(2),
    Cell(3),
    Cell(3, registered=True),
    Cell(3, student_on_disk=False),
    Cell(3, persistence=100_000),
    Cell(3, checkpointing="nonreentrant"),
    Cell(3, checkpointing="reentrant"),
    Cell(None, checkpointing="reentrant"),
]


def add_lora(model, registered=False):
    with torch.random.fork_rng():
        torch.manual_seed(5)
        # with the usual B = 0 the first gradient of A is zero
        config = LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False)
        return get_peft_model(model, register_fused_lora(config) if registered else config)


def run_cells(cells: list[Cell], folder: str) -> list[dict]:
    with fused_backend():
        return [run_cell(cell, Path(folder)) for cell in cells]


def run_cell(cell: Cell, folder: Path) -> dict:
    checkpointing = {}
    if cell.checkpointing:
        kwargs = {"use_reentrant": cell.checkpointing == "reentrant"}
        checkpointing = {
            "activation_checkpointing": True,
            "activation_checkpointing_kwargs": kwargs,
        }
    deepspeed = None
    if cell.stage is not None:
        deepspeed = zero_config(cell.stage)
        # by default parameters as few and small as these are gathered once and stay
        deepspeed["zero_optimization"] |= {
            "stage3_param_persistence_threshold": cell.persistence,
            "stage3_max_live_parameters": 0,
            "stage3_max_reuse_distance": 0,
        }
    args = plain_sgd(
        folder / cell.name,
        zero_stage=cell.stage,
        deepspeed=deepspeed,
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=ACCUMULATION,
        learning_rate=LEARNING_RATE,
        logging_steps=1,
        kd_weight=0.0,
        ce_weight=1.0,
        **checkpointing,
    )
    if cell.student_on_disk:
        student = AutoModelForCausalLM.from_pretrained(folder / "student")
    else:
        student = tiny_llama()
    student = add_lora(student, cell.registered)
    report = None if cell.registered else patch_peft_model(student)
    trainer = DistillTrainer(
        student,
        args,
        None,
        train_dataset=TokenDataset(STEPS * ACCUMULATION * BATCH * RANKS),
        data_collator=align_collate,
    )
    with calls_of_the_op() as calls:
        trainer.train()
        trainer.evaluate(TokenDataset(3, seed=7))
    gathered = [
        name
        for name, parameter in trainer.student.named_parameters()
        if getattr(parameter, "ds_status", None) == ZeroParamStatus.AVAILABLE
        and not parameter.ds_persist
    ]
    trainer.save_model(str(folder / cell.name))
    return {
        "gathered": gathered,
        "zero_stage": trainer.zero_stage,
        "sizes": set(sizes(calls)),
        "partitioned": any(hasattr(p, "ds_id") for p in trainer.student.parameters()),
        "report": report,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fused_lora")
    tiny_llama().save_pretrained(folder / "student")
    return folder


@pytest.fixture(scope="module")
def results(ranks, folder):
    results = ranks.run(run_cells, CELLS, str(folder), timeout=900)
    return {cell: [rank[i] for rank in results] for i, cell in enumerate(CELLS)}


@pytest.fixture(scope="module")
def reference(folder):
    """(start, fp64 truth, fp32 yardstick) of plain PEFT."""
    student = add_lora(AutoModelForCausalLM.from_pretrained(folder / "student"))
    data = TokenDataset(STEPS * ACCUMULATION * BATCH * RANKS)
    size = len(data) // STEPS
    rows = [data[i] for i in range(len(data))]
    steps = [[align_collate(rows[s * size : (s + 1) * size])] for s in range(STEPS)]
    truth, yardstick = (
        train_dense(student, None, steps, OBJECTIVE, LEARNING_RATE, dtype)
        for dtype in (torch.float64, torch.float32)
    )
    return tuple(dict(model.named_parameters()) for model in (student, truth, yardstick))


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_weights_equal_the_dense_reference(cell, folder, results, reference):
    start, truth, yardstick = reference
    base = AutoModelForCausalLM.from_pretrained(folder / "student")
    saved = dict(PeftModel.from_pretrained(base, folder / cell.name).named_parameters())
    assert saved.keys() == truth.keys()
    for name, expected in truth.items():
        if not start[name].requires_grad:
            assert torch.equal(saved[name].double(), expected), name
            continue
        moved = (expected - start[name]).abs().max().item()
        # the order of additions differs between ranks and micro-batches: a few roundings of the
        # update
        own = (yardstick[name].double() - expected).abs().max().item()
        budget = 2 * own + 8 * torch.finfo(torch.float32).eps * expected.abs().max().item()
        error = (saved[name].double() - expected).abs().max().item()
        assert moved > 20 * budget, f"{name} moved {moved:.2e}, too little to tell"
        assert error <= budget, f"{name}: error {error:.2e}, budget {budget:.2e}"


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_the_op_ran_and_groups_only_where_parameters_are_whole(cell, results):
    for rank in results[cell]:
        assert rank["zero_stage"] == cell.stage
        assert rank["partitioned"] == (cell.stage == 3)
        assert rank["sizes"] == ({1} if cell.stage == 3 else {1, 2, 3})


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_no_parameter_stays_gathered(cell, results):
    """A layer that read parameters of its sub-modules has to give them back."""
    for rank in results[cell]:
        assert rank["gathered"] == []


# --- FSDP


def run_fsdp(versions: list[int]) -> list[dict]:
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    with fused_backend():
        return [run_sharded(version) for version in versions]


def run_sharded(version: int) -> dict:
    plain = lora_model()
    truth = outputs_and_gradients(copy.deepcopy(plain).double())
    yardstick = outputs_and_gradients(plain)
    model = lora_model()
    patch_peft_model(model)
    if version == 2:
        mesh = init_device_mesh("cpu", (RANKS,))
        for layer in model.base_model.model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    else:
        model = FullyShardedDataParallel(
            model,
            use_orig_params=True,
            device_id=torch.device("cpu"),
            auto_wrap_policy=ModuleWrapPolicy({LlamaDecoderLayer}),
        )
    with calls_of_the_op() as calls:
        got = outputs_and_gradients(model)
    if version == 2:
        got = {n: v.full_tensor() if isinstance(v, DTensor) else v for n, v in got.items()}
    else:
        got = {"logits": got["logits"]}
        with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    got[name.replace("_fsdp_wrapped_module.", "")] = parameter.grad.clone()
    assert_all_within_budget(got, truth, yardstick)
    return {"sizes": sizes(calls), "report": patch_peft_model(model)}


@pytest.fixture(scope="module")
def fsdp(ranks):
    results = ranks.run(run_fsdp, [1, 2], timeout=900)
    return {version: [rank[version - 1] for rank in results] for version in (1, 2)}


def test_fsdp2_runs_groups_within_a_sharded_layer(fsdp):
    for rank in fsdp[2]:
        assert rank["sizes"] == sorted(2 * [1, 1, 2, 3])


def test_fsdp1_is_left_to_peft_and_the_report_says_so(fsdp):
    for rank in fsdp[1]:
        assert rank["sizes"] == []
        assert rank["report"].num_fused == 0
        assert {reason.split()[0] for _, reason in rank["report"].declined} == {"FSDP1"}


# --- reports


def test_the_report_says_why_partitioned_layers_are_not_grouped(results):
    partitioned, whole = results[Cell(3)][0]["report"], results[Cell(2)][0]["report"]
    assert not partitioned.groups
    assert {reason for _, reason in partitioned.apart} == {
        "ZeRO-3 gathers the parameters of one module at a time"
    }
    assert len(partitioned.singles) == 14
    assert len(whole.groups) == 4
    assert not whole.apart

"""FSDP2 on two ranks: what is sharded, resumed runs, broken gradients, teachers, precision.

That its gradients are exact is shown in test_parity_distributed.py, among those of ZeRO.
"""

import dataclasses
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, TrainingArguments

from modxfer_fast.config import ConfigError
from modxfer_fast.engine import (
    DistillConfig,
    DistillTrainer,
    NonFiniteError,
    ShardedTeacher,
    last_complete_checkpoint,
)
from modxfer_fast.jobs.distill.arguments import check_training
from tests.support.models import TokenDataset, align_collate, tiny_llama


@dataclasses.dataclass(frozen=True)
class Cell:
    state: str = "FULL_STATE_DICT"
    lora: bool = False
    tied: bool = False
    bf16: bool = False
    hidden: bool = False
    wrap: str = "TRANSFORMER_BASED_WRAP"

    @property
    def name(self) -> str:
        named = [self.state.split("_")[0].lower()]
        named += [n for n in ("lora", "tied", "bf16", "hidden") if getattr(self, n)]
        return "-".join(named)


CELLS = [
    Cell(tied=True),
    Cell("SHARDED_STATE_DICT", lora=True, hidden=True),
    Cell("SHARDED_STATE_DICT", bf16=True),
    Cell(lora=True, wrap="NO_WRAP"),
]


def make_trainer(folder: Path, cell: Cell, *, divided_teacher=False, **options) -> DistillTrainer:
    args = DistillConfig(
        **{
            "output_dir": str(folder / cell.name),
            "fsdp": True,
            "fsdp_config": {
                "version": 2,
                "state_dict_type": cell.state,
                "auto_wrap_policy": cell.wrap,
            },
            "bf16": cell.bf16,
            "max_steps": 4,
            "save_steps": 2,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "cosine",
            "logging_steps": 1,
            "report_to": "none",
            "disable_tqdm": True,
            "hidden_states": {"layers": {2: 3}} if cell.hidden else None,
            **options,
        }
    )
    student = tiny_llama(tied=cell.tied, attention_dropout=0.1)
    if cell.lora:
        torch.manual_seed(5)
        student = get_peft_model(student, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    teacher = tiny_llama(48, 3, seed=1)
    return DistillTrainer(
        student,
        args,
        ShardedTeacher(teacher) if divided_teacher else teacher,
        TokenDataset(16),
        TokenDataset(3, seed=7),
        data_collator=align_collate,
    )


def train(cells: list[Cell], folder: str) -> list[dict]:
    told = []
    for cell in cells:
        trainer = make_trainer(Path(folder), cell)
        trainer.train()
        trainer.save_model(f"{folder}/{cell.name}-whole")
        params = list(trainer.model.parameters())
        told.append(
            {
                "sharded": all(isinstance(param, DTensor) for param in params),
                "here": sum(param.to_local().numel() for param in params),
                "all": sum(param.numel() for param in params),
                "log": [entry for entry in trainer.state.log_history if "loss" in entry],
            }
        )
    return told


def resume(cells: list[Cell], folder: str) -> list[list[dict]]:
    told = []
    for cell in cells:
        trainer = make_trainer(Path(folder), cell, save_strategy="no")
        trainer.evaluate()
        checkpoint = Path(folder) / cell.name / "checkpoint-2"
        trainer.train(resume_from_checkpoint=str(checkpoint))
        trainer.save_model(f"{folder}/{cell.name}-resumed")
        told.append([entry for entry in trainer.state.log_history if "loss" in entry])
    return told


@pytest.fixture(scope="module")
def runs(ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fsdp")
    trained = ranks.run(train, CELLS, str(folder), timeout=600)
    resumed = ranks.run(resume, CELLS, str(folder), timeout=600)
    return folder, trained, resumed


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_each_rank_has_half_of_the_parameters(runs, cell):
    for rank in runs[1]:
        told = rank[CELLS.index(cell)]
        assert told["sharded"]
        assert told["here"] <= 0.55 * told["all"]


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_a_resumed_run_is_the_uninterrupted_one(runs, cell):
    folder, trained, resumed = runs
    for one, other in zip(trained, resumed, strict=True):
        was, now = one[CELLS.index(cell)]["log"], other[CELLS.index(cell)]
        for name in ("loss", "kd_loss", "grad_norm", "learning_rate"):
            assert [entry[name] for entry in now] == [entry[name] for entry in was]
    for file in (folder / f"{cell.name}-whole").glob("*.safetensors"):
        whole, again = load_file(file), load_file(folder / f"{cell.name}-resumed" / file.name)
        assert whole.keys() == again.keys()
        assert all(torch.equal(again[name], value) for name, value in whole.items())


def test_the_saved_student_is_an_ordinary_folder(runs):
    folder = runs[0]
    saved = AutoModelForCausalLM.from_pretrained(folder / f"{CELLS[0].name}-whole")
    start = tiny_llama(tied=True)
    assert saved.state_dict().keys() == start.state_dict().keys()
    assert not torch.equal(saved.lm_head.weight, start.lm_head.weight)


def test_checkpoints_of_adapters_leave_the_base_out(runs):
    folder = runs[0]
    state = torch.load(folder / CELLS[3].name / "checkpoint-2" / "fsdp_state.pt", weights_only=True)
    assert state["model"]
    assert all("lora" in name for name in state["model"])


def test_checkpoints_are_sealed(runs):
    folder = runs[0] / CELLS[1].name
    damaged = next((folder / "checkpoint-4" / "fsdp_state").glob("*.distcp"))
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    assert Path(last_complete_checkpoint(folder, lambda line: None)).name == "checkpoint-2"


def best_and_broken(folder: str) -> dict:
    trainer = make_trainer(
        Path(folder),
        Cell(),
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_kd",
        learning_rate=0.3,
    )
    trainer.train()
    evaluated = [e["eval_kd"] for e in trainer.state.log_history if "eval_kd" in e]
    told = {"best": min(evaluated), "last": evaluated[-1], "now": trainer.evaluate()["eval_kd"]}
    trainer = make_trainer(Path(folder), Cell(), max_skipped_steps=1, save_strategy="no")
    rank = trainer.args.process_index

    def break_it(module, args, output):
        return output * float("nan") if module.training and rank == 1 else output

    trainer.student.model.norm.register_forward_hook(break_it)
    before = {name: p.detach().clone() for name, p in trainer.student.named_parameters()}
    try:
        trainer.train()
    except NonFiniteError as error:
        told["error"] = str(error)
    now = dict(trainer.student.named_parameters())
    told["kept"] = all(torch.equal(now[name].full_tensor(), p) for name, p in before.items())
    for kind in (False, True):
        trainer = make_trainer(Path(folder), Cell(), divided_teacher=kind, save_strategy="no")
        trainer.train()
        told[f"log-{kind}"] = [e["loss"] for e in trainer.state.log_history if "loss" in e]
    plain = make_trainer(Path(folder), Cell(), fsdp=None, fsdp_config=None, save_strategy="no")
    told["after"] = str(plain.accelerator.distributed_type)
    return told


@pytest.fixture(scope="module")
def told(ranks, tmp_path_factory):
    return ranks.run(best_and_broken, str(tmp_path_factory.mktemp("others")), timeout=600)


def test_the_best_checkpoint_comes_back(told):
    for rank in told:
        assert rank["now"] == pytest.approx(rank["best"], rel=1e-6)


def test_a_gradient_broken_on_one_rank_changes_no_weight_on_any(told):
    for rank in told:
        assert "2 updates in a row were not finite" in rank["error"]
        assert rank["kept"]


def test_a_divided_teacher_teaches_the_same(told):
    for rank in told:
        assert rank["log-True"] == rank["log-False"]


def test_a_later_trainer_of_the_process_is_plain(told):
    assert {rank["after"] for rank in told} == {"DistributedType.MULTI_CPU"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fsdp_config": {"version": 1}}, "fsdp_config.version: expected 2, got 1"),
        ({"fsdp_config": {"fsdp_version": 1}}, "fsdp_config.fsdp_version: expected 2, got 1"),
        (
            {"fsdp_config": {"reshard_after_foward": True}},
            "unknown key; did you mean 'reshard_after_forward'",
        ),
        ({"fsdp_config": {"cpu_ram_efficient_loading": True}}, "the teacher would have no weights"),
        ({"fsdp_config": {"cpu_offload": True}}, "fsdp_config.cpu_offload: expected it off"),
        ({"fsdp_config": {"state_dict_type": "LOCAL"}}, "expected one of FULL_STATE_DICT"),
        ({"fsdp_config": {"auto_wrap_policy": "SIZE_BASED_WRAP"}}, "expected one of TRANSFORMER"),
        ({"fsdp_config": {"activation_checkpointing": True}}, "training.activation_checkpointing"),
        ({"zero_stage": 2}, "zero_stage: expected nothing beside fsdp, got 2"),
        ({"fp16": True}, "fp16: expected bf16 beside fsdp"),
        ({"eval_samples": 2}, "eval_samples: expected 0 beside fsdp"),
        ({"fsdp": None, "fsdp_config": {"version": 2}}, "fsdp: expected true beside fsdp_config"),
    ],
)
def test_mistakes(tmp_path, monkeypatch, options, message):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=message):
        DistillConfig(output_dir=str(tmp_path), **{"fsdp": True, **options})


def test_without_a_launcher_or_with_one_process(tmp_path, monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match=r"training: fsdp: RANK, .* not set; .*torchrun"):
        check_training({"fsdp": True}, "training")
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="training: fsdp: expected several processes on a CPU"):
        check_training({"fsdp": True}, "training")


def test_a_launcher_that_asks_for_it_does_not_ask_evaluation_too(tmp_path, monkeypatch):
    def accepted(args):
        raise StopIteration

    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with monkeypatch.context() as launched:
        for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "2")):
            launched.setenv(name, value)
        launched.setattr(TrainingArguments, "__post_init__", accepted)
        with pytest.raises(StopIteration):
            DistillConfig(output_dir=str(tmp_path), fsdp=True)
    assert not DistillConfig(output_dir=str(tmp_path)).fsdp  # of the same process


def test_a_launcher_that_asks_for_it_is_not_passed_over(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="fsdp: expected true, because `accelerate launch"):
        DistillConfig(output_dir=str(tmp_path))

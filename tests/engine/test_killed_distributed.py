"""Two ranks of which one is killed at a random step, then two that go on: equal to the bit to two
that were never stopped, in all that a checkpoint holds, for each stage and teacher plan.

Each run has processes of its own, forked from two that have only imported what it needs.
"""

import dataclasses
import gc
import importlib.util
import json
import os
import random
import signal
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch.utils._pytree import MappingKey, tree_leaves_with_path
from transformers import AutoModelForCausalLM, TrainerCallback

from modxfer_fast.engine import (
    CachedTeacher,
    DistillConfig,
    DistillTrainer,
    QuantizedTeacher,
    SelfDistillation,
    ServedTeacher,
    SeveralTeachers,
    ShardedTeacher,
    Teacher,
)
from modxfer_fast.engine.checkpoint import marked_checkpoints
from modxfer_fast.jobs.cache.capture import capture
from modxfer_fast.serving import FORMATS, ListedAnswers, Server
from modxfer_fast.teacher_cache import Payload, TeacherCache, documents_in
from modxfer_fast.testing import run_distributed
from tests.support.forked import run_forked
from tests.support.model_server import ModelServer, serving
from tests.support.models import VOCAB_SIZE, TokenDataset, align_collate, tiny_llama

STEPS = 6
ON_POLICY = {"fraction": 0.6, "prompt_length": 3, "max_new_tokens": 4, "reuse": 4}


@dataclasses.dataclass(frozen=True)
class Cell:
    stage: int | str | None
    lora: bool
    plan: str
    on_policy: bool = False

    @property
    def name(self) -> str:
        return f"{self.stage}{'-lora' * self.lora}-{self.plan}{'-on_policy' * self.on_policy}"


CELLS = [
    Cell(1, False, "replica"),
    Cell(2, True, "zero3"),
    Cell(3, False, "zero3_offload"),
    Cell(0, True, "cached"),
    Cell(2, False, "served"),
    Cell(1, True, "base"),
    Cell(3, True, "ema", on_policy=True),
    Cell(0, False, "quantized"),
    Cell(3, False, "several"),
    Cell("fsdp", False, "replica"),
    Cell("fsdp", True, "served", on_policy=True),
]
HAS_TORCHAO = importlib.util.find_spec("torchao") is not None


class KilledAt(TrainerCallback):
    """Rank 1, in the middle of a step."""

    def __init__(self, step: int):
        self.step = step

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if args.process_index == 1 and state.global_step + 1 == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def teacher_of(plan: str, folder: Path, url: str):
    if plan == "cached":
        return CachedTeacher(folder / "cache", "hidden")
    if plan == "served":
        answers = ListedAnswers(Server(url), FORMATS["vllm"], "tiny", classes=VOCAB_SIZE, top_k=5)
        return ServedTeacher(answers)
    if plan in ("base", "ema"):
        return SelfDistillation(plan, 0.6)
    model = AutoModelForCausalLM.from_pretrained(folder / "teacher")
    if plan == "replica":
        return Teacher(model)
    if plan == "quantized":
        return QuantizedTeacher(model)
    if plan == "several":
        second = AutoModelForCausalLM.from_pretrained(folder / "student")
        return SeveralTeachers({"first": model, "second": second}, {"second": 0.5})
    return ShardedTeacher(model, offload=plan.endswith("offload"))


def train(cell: Cell, folder: str, output: str, url: str, kill_at: int | None) -> None:
    """From the last checkpoint, where there is one."""
    shards = {"fsdp": True} if cell.stage == "fsdp" else {"zero_stage": cell.stage}
    args = DistillConfig(
        output_dir=str(Path(folder) / output / cell.name),
        max_steps=STEPS,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=2,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        optim="adamw_torch",
        learning_rate=1e-2,
        lr_scheduler_type="cosine",
        warmup_steps=1,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        on_policy=ON_POLICY if cell.on_policy else None,
        **shards,
    )
    student = AutoModelForCausalLM.from_pretrained(Path(folder) / "student", attention_dropout=0.1)
    if cell.lora:
        torch.manual_seed(5)
        targets = ["q_proj", "down_proj"]
        student = get_peft_model(student, LoraConfig(r=4, lora_dropout=0.1, target_modules=targets))
    trainer = DistillTrainer(
        student,
        args,
        teacher_of(cell.plan, Path(folder), url),
        train_dataset=TokenDataset(10),
        data_collator=align_collate,
        callbacks=[] if kill_at is None else [KilledAt(kill_at)],
    )
    trainer.train(resume_from_checkpoint=bool(marked_checkpoints(args.output_dir)))


def train_all(cells: list[Cell], folder: str, url: str, kill_at: list[int]) -> list[list[int]]:
    """Of each cell the codes with which a run that is never stopped ends, one that is killed, and
    one that goes on."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed  # noqa: F401  (before they fork)

    gc.freeze()

    return [
        [
            run_forked(train, cell, folder, output, url, kill, beside=folder)
            for output, kill in (("whole", None), ("killed", step), ("killed", None))
        ]
        for cell, step in zip(cells, kill_at, strict=True)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    tiny_llama().save_pretrained(folder / "student")
    teacher = tiny_llama(48, 2, seed=1)
    teacher.save_pretrained(folder / "teacher")
    facts = {"classes": VOCAB_SIZE, "logit_scale": 1.0, "softcap": None}
    head = {"weight": teacher.lm_head.weight}
    cache = TeacherCache.create(folder / "cache", Payload("float32", 48, 0), facts, head)
    rows = [{"input_ids": row} for row in TokenDataset(10).rows]
    documents = list(documents_in(rows, align_collate))
    capture(cache, documents, Teacher(teacher), batch_tokens=40, device=torch.device("cpu"))
    return folder


@pytest.fixture(scope="module")
def codes(folder):
    """By cell, of each rank."""
    cells = [cell for cell in CELLS if cell.plan != "quantized" or HAS_TORCHAO]
    kill_at = [random.SystemRandom().randint(1, STEPS) for _ in cells]
    for cell, step in zip(cells, kill_at, strict=True):
        print(f"{cell.name}: killed in step {step}")
    with serving(ModelServer(tiny_llama(48, 2, seed=1))) as url:
        told = run_distributed(train_all, cells, str(folder), url, kill_at, timeout=900)
    return {cell: [rank[i] for rank in told] for i, cell in enumerate(cells)}


def contents(checkpoint: Path) -> dict[str, object]:
    """Every tensor and number of a checkpoint, by file and place, but what a clock said."""
    found: dict[str, object] = {}
    for file in sorted(p for p in checkpoint.rglob("*") if p.suffix in (".pt", ".pth")):
        for path, leaf in tree_leaves_with_path(torch.load(file, weights_only=False)):
            if path[-1:] != (MappingKey("seconds"),):
                found[f"{file.relative_to(checkpoint)}{path}"] = leaf
    for file in checkpoint.glob("*.safetensors"):  # the student, and an average of it
        found |= {f"{file.name}: {name}": value for name, value in load_file(file).items()}
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    for entry in state["log_history"]:
        for key in ("loss", "kd_loss", "learning_rate", "num_tokens", "grad_norm"):
            found[f"step {entry['step']}: {key}"] = entry.get(key)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_what_went_on_is_what_was_never_stopped(cell, folder, codes):
    if cell.plan == "quantized":
        pytest.importorskip("torchao")
    (whole, _, resumed), (whole_1, killed, resumed_1) = codes[cell]
    assert (whole, resumed, whole_1, resumed_1) == (0, 0, 0, 0)
    assert killed == -signal.SIGKILL
    last = [folder / output / cell.name for output in ("whole", "killed")]
    assert all(
        sorted(p.name for p in f.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
        for f in last
    )
    expected, got = (contents(f / "checkpoint-6") for f in last)
    assert expected.keys() == got.keys()
    parts = ["exp_avg_sq"]
    parts += ["self_teacher.safetensors"] * (cell.plan == "ema")
    parts += ["rollouts_1.pt"] * cell.on_policy
    for part in parts:
        assert any(part in name for name in expected), part
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(got[name], value), name
        elif isinstance(value, bool | int | float | str):
            assert got[name] == value, name

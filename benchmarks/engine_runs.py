"""What `benchmarks.engine_steps` trains: one run of one library, in a process of its own.

    python -m benchmarks.engine_runs SPEC FOLDER OUT

SPEC is the JSON of a `Run` and a `Setting`, FOLDER what `engine_steps` has prepared. The student
that was trained and, for each rank, what it measured are left in OUT.
"""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    TrainerCallback,
)

from benchmarks.peers import beta_of
from modxfer_fast.data.collator import CausalCollator
from modxfer_fast.engine import (
    CachedTeacher,
    DistillConfig,
    DistillTrainer,
    ServedTeacher,
    ShardedTeacher,
    Teacher,
)
from modxfer_fast.serving import FORMATS, ListedAnswers, Server

OURS, GKD, ON_POLICY = "ours", "TRL GKD", "TRL DistillationTrainer"
PRODUCTS = "matrix products"


@dataclass(frozen=True)
class Run:
    """What is trained.

    Attributes:
        library: OURS, a trainer of TRL, or PRODUCTS: those of the linears of both models, which
            no trainer is without, and nothing else.
        impl: of the loss, fused or dense.
        plan: of the teacher.
        zero_stage: of the student; None for DDP, or nothing on one rank.
        on_policy: trained on what the student writes behind the first quarter of each row.
    """

    library: str
    divergence: str = ""
    impl: str = "fused"
    plan: str = "replica"
    zero_stage: int | None = None
    on_policy: bool = False

    def __str__(self) -> str:
        parts = [self.library] + [self.divergence] * bool(self.divergence)
        parts += [self.impl] * (self.impl != "fused")
        parts += [f"{self.plan} teacher"] * (self.plan != "replica")
        parts += [f"ZeRO-{self.zero_stage}"] * (self.zero_stage is not None)
        parts += ["on-policy"] * self.on_policy
        return " ".join(parts)


def runs_of(ranks: int) -> Iterator[Run]:
    """Those of the table."""
    yield Run(PRODUCTS)
    for divergence in ("forward_kl", "jsd"):
        yield Run(OURS, divergence)
        yield Run(OURS, divergence, impl="dense")
        yield Run(OURS, divergence, plan="cached")
        yield Run(GKD, divergence)
    yield Run(OURS, "reverse_kl", on_policy=True)
    yield Run(ON_POLICY, "reverse_kl", on_policy=True)
    yield Run(OURS, "forward_kl", plan="served")
    if ranks > 1:
        for stage in range(4):
            yield Run(OURS, "forward_kl", zero_stage=stage)
        yield Run(OURS, "forward_kl", plan="zero3", zero_stage=2)


@dataclass(frozen=True)
class Setting:
    """What all runs share.

    Attributes:
        served: address of a vLLM that serves the teacher, for the run that asks it.
    """

    pair: str
    ranks: int
    rows: int
    length: int
    steps: int
    warmup: int
    learning_rate: float
    served: str | None = None

    @property
    def prompt(self) -> int:
        """Tokens of a row that are a prompt, where the student writes the others."""
        return self.length // 4


class _Clock(TrainerCallback):
    """Seconds of each step, with its batches, which may have to be written first."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_begin(self, args, state, control, **kwargs):
        self._last = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self._last = now


def work(run: Run, setting: Setting, folder: Path, out: Path) -> None:
    """Trains, saves the student to `out`, and what a rank measured beside it."""
    torch.set_num_threads(max((os.cpu_count() or 1) // setting.ranks, 1))
    measured = (_products if run.library == PRODUCTS else _train)(run, setting, folder, out)
    rank = int(os.environ.get("RANK", 0))
    (out / f"rank-{rank}.json").write_text(json.dumps(measured))


def _train(run: Run, setting: Setting, folder: Path, out: Path) -> dict[str, Any]:
    rows = torch.load(folder / "rows.pt")["train"]
    clock = _Clock()
    common = {
        "output_dir": str(out / "checkpoints"),
        "per_device_train_batch_size": setting.rows,
        "max_steps": setting.steps,
        "learning_rate": setting.learning_rate,
        "lr_scheduler_type": "constant",
        "gradient_checkpointing": False,
        "logging_steps": setting.steps,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": False,
        "use_cpu": not torch.cuda.is_available(),
        "seed": 0,
    }
    make = {OURS: _our_trainer, GKD: _gkd, ON_POLICY: _trl_on_policy}[run.library]
    trainer, teacher_mib = make(run, setting, folder, rows, common, clock)
    _forget_peak()
    trainer.train()
    peak = _peak_mib()
    trainer.save_model(str(out / "student"))
    written = [
        entry[key]
        for entry in trainer.state.log_history
        for key in ("completion_length", "completions/mean_length")
        if key in entry
    ]
    tokens = written[-1] if run.on_policy else setting.length
    return {
        "seconds": clock.seconds,
        "tokens": setting.rows * tokens,
        "peak_mib": peak,
        "teacher_mib": teacher_mib,
    }


def _products(run: Run, setting: Setting, folder: Path, out: Path) -> dict[str, Any]:
    tokens = setting.rows * setting.length
    alone = products(load(folder / "teacher"), load(folder / "student"), tokens)
    seconds = []
    for _ in range(setting.steps):
        start = time.perf_counter()
        for product in alone:
            product()
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds, "tokens": tokens}


def products(teacher: nn.Module, student: nn.Module, tokens: int) -> list[Callable[[], Tensor]]:
    """Of each linear y = x W^T of the teacher y, of each of the student y and both gradients, all
    into the same memory, so that none is timed with pages that the system has yet to give."""
    pairs = []
    for model in (teacher, student):
        for linear in (m for m in model.modules() if isinstance(m, nn.Linear)):
            weight = linear.weight.detach()
            x, y = (torch.randn(tokens, width) for width in reversed(weight.shape))
            pairs.append((x, weight.T))
            if model is student:
                pairs += [(y, weight), (y.T, x)]
    shapes = [(left.shape[0], right.shape[1]) for left, right in pairs]
    memory = torch.zeros(max(rows * columns for rows, columns in shapes))
    return [
        partial(torch.mm, *pair, out=memory[: math.prod(shape)].view(shape))
        for pair, shape in zip(pairs, shapes, strict=True)
    ]


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def our_rows(rows: Tensor) -> list[dict[str, Any]]:
    """As the engine's collators take them."""
    length = rows.shape[1]
    return [
        {"input_ids": row.tolist(), "lengths": [length], "is_target": [True] * length}
        for row in rows
    ]


Options = dict[str, Any]


def _our_trainer(
    run: Run, setting: Setting, folder: Path, rows: Tensor, common: Options, clock: _Clock
):
    written = {
        "fraction": 1.0,
        "prompt_length": setting.prompt,
        "max_new_tokens": setting.length - setting.prompt,
    }
    args = DistillConfig(
        **common,
        divergence=run.divergence,
        loss_impl=run.impl,
        zero_stage=run.zero_stage,
        on_policy=written if run.on_policy else None,
    )
    teacher: Any
    own: Sequence[Tensor] = ()
    if run.plan == "cached":
        teacher = CachedTeacher(folder / "cache")
        own = list(teacher.cache.head().values())
    elif run.plan == "served":
        teacher = _served(setting, folder)
    else:
        make = ShardedTeacher if run.plan == "zero3" else Teacher
        teacher = make(load(folder / "teacher"))
        own = [getattr(p, "ds_tensor", p) for p in teacher.model.parameters()]
    trainer = DistillTrainer(
        model=load(folder / "student"),
        args=args,
        teacher=teacher,
        train_dataset=our_rows(rows),
        data_collator=CausalCollator(0, packed=False),
        callbacks=[clock],
    )
    return trainer, _mib(own)


def _served(setting: Setting, folder: Path) -> ServedTeacher:
    assert setting.served is not None
    classes = AutoConfig.from_pretrained(folder / "teacher").vocab_size
    source = ListedAnswers(
        Server(setting.served), FORMATS["vllm"], setting.pair, classes=classes, top_k=20
    )
    return ServedTeacher(source)


def _gkd(run: Run, setting: Setting, folder: Path, rows: Tensor, common: Options, clock: _Clock):
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    def collate(batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        ids = torch.tensor([row["input_ids"] for row in batch])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

    teacher = load(folder / "teacher")
    trainer = GKDTrainer(
        model=load(folder / "student"),
        teacher_model=teacher,
        args=GKDConfig(**common, lmbda=0.0, beta=beta_of(run.divergence)),
        train_dataset=Dataset.from_dict({"input_ids": rows.tolist()}),
        data_collator=collate,
        processing_class=_tokenizer(folder),
        callbacks=[clock],
    )
    return trainer, _mib(list(teacher.parameters()))


def _trl_on_policy(
    run: Run, setting: Setting, folder: Path, rows: Tensor, common: Options, clock: _Clock
):
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer

    tokenizer = _tokenizer(folder)
    tokenizer.padding_side = "left"
    teacher = load(folder / "teacher")
    length = setting.length - setting.prompt
    trainer = DistillationTrainer(
        model=load(folder / "student"),
        teacher_model=teacher,
        args=DistillationConfig(
            **common, beta=beta_of(run.divergence), max_completion_length=length
        ),
        train_dataset=Dataset.from_dict(
            {"prompt": tokenizer.batch_decode(rows[:, : setting.prompt])}
        ),
        processing_class=tokenizer,
        callbacks=[clock],
    )
    return trainer, _mib(list(teacher.parameters()))


def _tokenizer(folder: Path) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def _mib(tensors: Sequence[Tensor]) -> float:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 2**20


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _peak_mib() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 2**10


if __name__ == "__main__":
    _spec = json.loads(sys.argv[1])
    work(Run(**_spec["run"]), Setting(**_spec["setting"]), Path(sys.argv[2]), Path(sys.argv[3]))

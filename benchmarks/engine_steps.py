"""Whole training steps of the engine beside those of TRL's trainers: speed, memory, quality.

    make bench-peers
    python -m benchmarks.engine_steps toy
    python -m benchmarks.engine_steps TEACHER --ranks 2 --runs "ours forward_kl ZeRO-2"

TEACHER is the folder of a causal language model whose student has every third of its blocks; `toy`
is a pair of random weights with a vocabulary of 49,152. Rows are of the standard library's
documentation, all of one length, so that nothing is padded. Every run is a process of its own, or
one a rank, in fp32, from the same start on the same rows with the same optimiser. It is timed step
by step, without its first steps, and its student is then compared with the teacher on rows that
none has seen. Memory is what a rank has resident at its peak while it trains, models included.
Several rounds run all of it in turn, so that what else runs on the machine meets everything.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    TrainerCallback,
)

from benchmarks.peers import beta_of
from modxfer_fast.data.collator import CausalCollator
from modxfer_fast.data.python_docs import python_docs
from modxfer_fast.data.tokenizer import train_tokenizer
from modxfer_fast.engine import (
    CachedTeacher,
    DistillConfig,
    DistillTrainer,
    ShardedTeacher,
    Teacher,
)
from modxfer_fast.jobs.cache.capture import capture
from modxfer_fast.measure import environment
from modxfer_fast.models.from_teacher import take_from_teacher
from modxfer_fast.teacher_cache import Payload, TeacherCache
from modxfer_fast.teacher_cache.documents import documents_in

TOY_CLASSES = 49152
OURS, GKD, ON_POLICY = "ours", "TRL GKD", "TRL DistillationTrainer"


@dataclass(frozen=True)
class Run:
    """What is trained.

    Attributes:
        library: OURS or a trainer of TRL.
        impl: of the loss, fused or dense.
        plan: of the teacher.
        zero_stage: of the student; None for DDP, or nothing on one rank.
        on_policy: trained on what the student writes behind the first quarter of each row.
    """

    library: str
    divergence: str
    impl: str = "fused"
    plan: str = "replica"
    zero_stage: int | None = None
    on_policy: bool = False

    def __str__(self) -> str:
        parts = [self.library, self.divergence]
        parts += [self.impl] * (self.impl != "fused")
        parts += [f"{self.plan} teacher"] * (self.plan != "replica")
        parts += [f"ZeRO-{self.zero_stage}"] * (self.zero_stage is not None)
        parts += ["on-policy"] * self.on_policy
        return " ".join(parts)


def runs_of(ranks: int) -> Iterator[Run]:
    """Those of the table."""
    for divergence in ("forward_kl", "jsd"):
        yield Run(OURS, divergence)
        yield Run(OURS, divergence, impl="dense")
        yield Run(OURS, divergence, plan="cached")
        yield Run(GKD, divergence)
    yield Run(OURS, "reverse_kl", on_policy=True)
    yield Run(ON_POLICY, "reverse_kl", on_policy=True)
    if ranks > 1:
        for stage in range(4):
            yield Run(OURS, "forward_kl", zero_stage=stage)
        yield Run(OURS, "forward_kl", plan="zero3", zero_stage=2)


@dataclass(frozen=True)
class Setting:
    """What all runs share."""

    pair: str
    ranks: int
    rows: int
    length: int
    steps: int
    warmup: int
    learning_rate: float

    @property
    def prompt(self) -> int:
        """Tokens of a row that are a prompt, where the student writes the others."""
        return self.length // 4


@dataclass(frozen=True)
class Figures:
    """Of one run in one round.

    Attributes:
        tokens_per_s: that are trained on, of all ranks, of the median step; low and high, of the
            slower and the faster quartile.
        peak_mib: resident, of the rank that has most.
        teacher_mib: its parameters on a rank.
        kl, perplexity: held out, after training; before it in the row `start`.
    """

    run: str
    tokens_per_s: float | None
    low: float | None
    high: float | None
    peak_mib: float | None
    teacher_mib: float | None
    kl: float
    perplexity: float


# ---- the pair and its rows


def prepare(setting: Setting, folder: Path, held_out: int) -> None:
    """Models, rows and the cache of a teacher, for all runs."""
    torch.manual_seed(0)
    if setting.pair == "toy":
        teacher, student = (_toy(depth, width) for depth, width in ((6, 384), (2, 192)))
        encode = train_tokenizer(python_docs(), 8192)
    else:
        teacher = AutoModelForCausalLM.from_pretrained(setting.pair, dtype=torch.float32)
        encode = AutoTokenizer.from_pretrained(setting.pair)
        student = _third_of(teacher)
    for name, model in (("teacher", teacher), ("student", student)):
        model.save_pretrained(folder / name)
    encode.save_pretrained(folder / "tokenizer")
    number = setting.rows * setting.ranks * setting.steps
    wanted = (number + held_out) * setting.length
    ids: list[int] = []
    for text in python_docs():
        ids += encode(text, verbose=False)["input_ids"]
        if len(ids) >= wanted:
            break
    else:
        raise SystemExit(f"the documentation has {len(ids)} tokens, {wanted} are asked for")
    rows = torch.tensor(ids[:wanted]).view(-1, setting.length)
    torch.save({"train": rows[:number], "held_out": rows[number:]}, folder / "rows.pt")
    facts = {"classes": teacher.config.vocab_size, "logit_scale": 1.0, "softcap": None}
    payload = Payload("float32", teacher.config.hidden_size)
    head = {"weight": teacher.get_output_embeddings().weight}
    cache = TeacherCache.create(folder / "cache", payload, facts, head)
    documents = documents_in(_ours(rows[:number]), CausalCollator(0, packed=False))
    capture(cache, documents, Teacher(teacher), batch_tokens=2048, device=torch.device("cpu"))


def _toy(depth: int, width: int) -> PreTrainedModel:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=TOY_CLASSES,
            hidden_size=width,
            intermediate_size=8 * width // 3,
            num_hidden_layers=depth,
            num_attention_heads=width // 64,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            initializer_range=0.1,  # so that the teacher prefers some tokens to others
        )
    )


def _third_of(teacher: PreTrainedModel) -> PreTrainedModel:
    layers = list(range(0, teacher.config.num_hidden_layers, 3))
    config = type(teacher.config).from_dict(
        {**teacher.config.to_dict(), "num_hidden_layers": len(layers), "layer_types": None}
    )
    student = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    take_from_teacher(student, teacher, layers=layers)
    return student


def _ours(rows: Tensor) -> list[dict[str, Any]]:
    length = rows.shape[1]
    return [
        {"input_ids": row.tolist(), "lengths": [length], "is_target": [True] * length}
        for row in rows
    ]


# ---- one run, in a process of its own


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
    rank = int(os.environ.get("RANK", 0))
    written = [
        entry[key]
        for entry in trainer.state.log_history
        for key in ("completion_length", "completions/mean_length")
        if key in entry
    ]
    tokens = written[-1] if run.on_policy else setting.length
    measured = {
        "seconds": clock.seconds,
        "tokens": setting.rows * tokens,
        "peak_mib": peak,
        "teacher_mib": teacher_mib,
    }
    (out / f"rank-{rank}.json").write_text(json.dumps(measured))


def _load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


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
    if run.plan == "cached":
        teacher: Any = CachedTeacher(folder / "cache")
        own = list(teacher.cache.head().values())
    else:
        make = ShardedTeacher if run.plan == "zero3" else Teacher
        teacher = make(_load(folder / "teacher"))
        own = [getattr(p, "ds_tensor", p) for p in teacher.model.parameters()]
    trainer = DistillTrainer(
        model=_load(folder / "student"),
        args=args,
        teacher=teacher,
        train_dataset=_ours(rows),
        data_collator=CausalCollator(0, packed=False),
        callbacks=[clock],
    )
    return trainer, _mib(own)


def _gkd(run: Run, setting: Setting, folder: Path, rows: Tensor, common: Options, clock: _Clock):
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    def collate(batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        ids = torch.tensor([row["input_ids"] for row in batch])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

    teacher = _load(folder / "teacher")
    trainer = GKDTrainer(
        model=_load(folder / "student"),
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
    teacher = _load(folder / "teacher")
    length = setting.length - setting.prompt
    trainer = DistillationTrainer(
        model=_load(folder / "student"),
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


# ---- what a run came to


def figures(run: Run, setting: Setting, folder: Path, out: Path) -> Figures:
    """Starts the processes of a run and reads what they leave.

    Raises:
        RuntimeError: one ended with an error; what it said last.
    """
    this = Path(__file__)
    spec = json.dumps({"run": asdict(run), "setting": asdict(setting)})
    command = [sys.executable]
    if setting.ranks > 1:
        command += ["-m", "torch.distributed.run", "--nproc-per-node", str(setting.ranks)]
        command += ["--standalone"]
    command += ["-m", f"benchmarks.{this.stem}", "--work", spec, str(folder), str(out)]
    out.mkdir(parents=True)
    done = subprocess.run(command, cwd=this.parents[1], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{run}: {done.stderr[-2000:]}")
    ranks = [json.loads(path.read_text()) for path in sorted(out.glob("rank-*.json"))]
    steps = zip(*(rank["seconds"][setting.warmup :] for rank in ranks), strict=True)
    seconds = [max(step) for step in steps]
    tokens = sum(rank["tokens"] for rank in ranks)
    quick, median, slow = statistics.quantiles(seconds, n=4, method="inclusive")
    return Figures(
        str(run),
        *(tokens / value for value in (median, slow, quick)),
        max(rank["peak_mib"] for rank in ranks),
        max(rank["teacher_mib"] for rank in ranks),
        *quality(_load(out / "student"), _load(folder / "teacher"), _held_out(folder)),
    )


def _held_out(folder: Path) -> Tensor:
    return torch.load(folder / "rows.pt")["held_out"]


@torch.no_grad()
def quality(
    student: PreTrainedModel, teacher: PreTrainedModel, rows: Tensor
) -> tuple[float, float]:
    """KL(teacher || student) of a token, and the student's perplexity, in plain PyTorch."""
    divergence = surprise = 0.0
    for row in rows:
        log_p, log_q = (m(row[None]).logits[0, :-1].log_softmax(-1) for m in (teacher, student))
        divergence += float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
        surprise -= float(log_q.gather(-1, row[1:, None]).mean())
    return divergence / len(rows), float(torch.tensor(surprise / len(rows)).exp())


def over_rounds(rounds: Sequence[Figures]) -> Figures:
    """Medians of what rounds measured; of the interval its widest ends."""

    def of(name: str, choose: Callable[[list[float]], float] = statistics.median) -> float | None:
        values = [getattr(each, name) for each in rounds]
        return None if None in values else choose(values)

    medians = {f.name: of(f.name) for f in fields(Figures) if f.name != "run"}
    return replace(rounds[0], **medians | {"low": of("low", min), "high": of("high", max)})


def measure(setting: Setting, runs: Sequence[Run], rounds: int, held_out: int) -> list[Figures]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(setting, folder, held_out)
        measured: dict[Run, list[Figures]] = {run: [] for run in runs}
        start = quality(_load(folder / "student"), _load(folder / "teacher"), _held_out(folder))
        table = [Figures("start", None, None, None, None, None, *start)]
        for number in range(rounds):
            for run in runs:
                found = figures(run, setting, folder, folder / f"{number} {run}")
                measured[run].append(found)
                print(f"{number + 1}/{rounds} {_line(found)}", file=sys.stderr, flush=True)
        return table + [over_rounds(each) for each in measured.values()]


def _line(row: Figures) -> str:
    def cell(value: float | None, digits: int) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    speed = cell(row.tokens_per_s, 0) + (f" ({row.low:.0f} to {row.high:.0f})" if row.low else "")
    memory = f"{cell(row.peak_mib, 0)} | {cell(row.teacher_mib, 0)}"
    return f"| {row.run} | {speed} | {memory} | {row.kl:.4f} | {row.perplexity:.1f} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pair", help="toy, or the folder of a teacher")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--runs", nargs="+", help="names, as the table has them; default: all")
    parser.add_argument("--rows", type=int, default=4, help="of a micro-batch")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=2, help="steps that are not timed")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--held-out", type=int, default=8, help="rows")
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--csv", type=Path)
    asked = parser.parse_args()
    setting = Setting(**{f.name: getattr(asked, f.name) for f in fields(Setting)})
    runs = {str(run): run for run in runs_of(asked.ranks)}
    unknown = sorted(set(asked.runs or ()) - set(runs))
    if unknown:
        parser.error(f"--runs: expected among {'; '.join(runs)}; got {', '.join(unknown)}")
    if asked.steps - asked.warmup < 2:
        parser.error(f"--steps: expected two more than --warmup {asked.warmup}, got {asked.steps}")
    described = environment.describe("cpu")
    table = measure(
        setting, [runs[name] for name in asked.runs or runs], asked.rounds, asked.held_out
    )
    print(environment.header(described))
    print(f"{asdict(setting)}\n")
    print("| run | tokens/s (quartiles) | peak MiB a rank | teacher MiB a rank | KL | perplexity |")
    print("|---|---|---|---|---|---|")
    print("\n".join(map(_line, table)))
    if asked.csv:
        asked.csv.parent.mkdir(parents=True, exist_ok=True)
        with asked.csv.open("w", newline="") as file:
            file.write(f"# {json.dumps({**described, **asdict(setting)})}\n")
            writer = csv.DictWriter(file, [f.name for f in fields(Figures)], lineterminator="\n")
            writer.writeheader()
            writer.writerows(map(asdict, table))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        _spec = json.loads(sys.argv[2])
        work(Run(**_spec["run"]), Setting(**_spec["setting"]), Path(sys.argv[3]), Path(sys.argv[4]))
    else:
        main()

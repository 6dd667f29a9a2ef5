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
`matrix products` is the floor: those of the linears of both models and nothing else, so what no
trainer can be faster than.

A served teacher wants a vLLM: `vllm serve TEACHER`, then TEACHER with `--served` and its address.
"""

import argparse
import csv
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from benchmarks.engine_runs import PRODUCTS, Run, Setting, load, our_rows, runs_of
from modxfer_fast.data.collator import CausalCollator
from modxfer_fast.data.python_docs import python_docs
from modxfer_fast.data.tokenizer import train_tokenizer
from modxfer_fast.engine import Teacher
from modxfer_fast.jobs.cache.capture import capture
from modxfer_fast.measure import environment
from modxfer_fast.models.from_teacher import take_from_teacher
from modxfer_fast.teacher_cache import Payload, TeacherCache
from modxfer_fast.teacher_cache.documents import documents_in

TOY_CLASSES = 49152


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
    kl: float | None
    perplexity: float | None


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
    documents = documents_in(our_rows(rows[:number]), CausalCollator(0, packed=False))
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


# ---- what a run came to


def figures(run: Run, setting: Setting, folder: Path, out: Path) -> Figures:
    """Starts the processes of a run and reads what they leave.

    Raises:
        RuntimeError: one ended with an error; what it said last.
    """
    spec = json.dumps({"run": asdict(run), "setting": asdict(setting)})
    command = [sys.executable]
    if setting.ranks > 1:
        command += ["-m", "torch.distributed.run", "--nproc-per-node", str(setting.ranks)]
        command += ["--standalone"]
    command += ["-m", "benchmarks.engine_runs", spec, str(folder), str(out)]
    out.mkdir(parents=True)
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{run}: {done.stderr[-2000:]}")
    ranks = [json.loads(path.read_text()) for path in sorted(out.glob("rank-*.json"))]
    steps = zip(*(rank["seconds"][setting.warmup :] for rank in ranks), strict=True)
    seconds = [max(step) for step in steps]
    tokens = sum(rank["tokens"] for rank in ranks)
    quick, median, slow = statistics.quantiles(seconds, n=4, method="inclusive")
    speed = [tokens / value for value in (median, slow, quick)]
    if run.library == PRODUCTS:
        return Figures(str(run), *speed, None, None, None, None)
    return Figures(
        str(run),
        *speed,
        max(rank["peak_mib"] for rank in ranks),
        max(rank["teacher_mib"] for rank in ranks),
        *quality(load(out / "student"), load(folder / "teacher"), _held_out(folder)),
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
        start = quality(load(folder / "student"), load(folder / "teacher"), _held_out(folder))
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
    return f"| {row.run} | {speed} | {memory} | {cell(row.kl, 4)} | {cell(row.perplexity, 1)} |"


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
    parser.add_argument("--served", help="address of a vLLM that serves the teacher")
    parser.add_argument("--csv", type=Path)
    asked = parser.parse_args()
    setting = Setting(**{f.name: getattr(asked, f.name) for f in fields(Setting)})
    runs = {str(run): run for run in runs_of(asked.ranks) if run.plan != "served" or asked.served}
    unknown = sorted(set(asked.runs or ()) - set(runs))
    if unknown:
        parser.error(f"--runs: expected among {'; '.join(runs)}; got {', '.join(unknown)}")
    if asked.steps - asked.warmup < 2:
        parser.error(f"--steps: expected two more than --warmup {asked.warmup}, got {asked.steps}")
    described = environment.describe("cpu")
    told = asdict(setting) | {"pair": Path(setting.pair).name}
    table = measure(
        setting, [runs[name] for name in asked.runs or runs], asked.rounds, asked.held_out
    )
    print(environment.header(described))
    print(f"{told}\n")
    print("| run | tokens/s (quartiles) | peak MiB a rank | teacher MiB a rank | KL | perplexity |")
    print("|---|---|---|---|---|---|")
    print("\n".join(map(_line, table)))
    if asked.csv:
        asked.csv.parent.mkdir(parents=True, exist_ok=True)
        with asked.csv.open("w", newline="") as file:
            file.write(f"# {json.dumps({**described, **told})}\n")
            writer = csv.DictWriter(file, [f.name for f in fields(Figures)], lineterminator="\n")
            writer.writeheader()
            writer.writerows(map(asdict, table))


if __name__ == "__main__":
    main()

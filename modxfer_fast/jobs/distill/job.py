"""The phases of `modxfer distill`: data, teacher, then per seed the runs, then the report."""

import math
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from modxfer_fast import __version__
from modxfer_fast.config import ConfigError, JobConfig, LossSection, as_dict
from modxfer_fast.data import build_rows, load_documents, tokenizer_digest
from modxfer_fast.engine import (
    DistillConfig,
    DistillModule,
    Objective,
    Teacher,
    load_projections,
)
from modxfer_fast.files import new_folder, read_json, write_json
from modxfer_fast.jobs.distill.arguments import check_training, evaluation_args, training_args
from modxfer_fast.jobs.distill.loss_timing import time_losses
from modxfer_fast.jobs.distill.material import Material
from modxfer_fast.jobs.distill.models import (
    CROSS_ENTROPY,
    planned_configs,
    prepare_model,
    prepare_tokenizer,
)
from modxfer_fast.jobs.distill.part_timing import time_parts
from modxfer_fast.jobs.distill.summary import print_summary, summarise
from modxfer_fast.jobs.environment import environment, quieten_libraries
from modxfer_fast.jobs.output import CHECKPOINTS, REPORT_FILE, WorkFolder
from modxfer_fast.jobs.ranks import barrier, end_with_launcher, is_main, on_main
from modxfer_fast.jobs.stage import fingerprint
from modxfer_fast.jobs.store import Store
from modxfer_fast.jobs.threads import settle_threads
from modxfer_fast.models import (
    apply_peft,
    check_finite,
    check_packing,
    check_peft,
    check_rows_fit,
    load_adapter,
    load_model,
    patch_peft_model,
)
from modxfer_fast.report import JobConsole, plot_curves

# Held-out figures of causal language models always mean this, whatever a run minimises.
_MEASURED = LossSection(divergence="forward_kl", temperature=1.0, kd_weight=1.0, ce_weight=1.0)
_TIMED_ROWS = 32  # where compare.loss_rows says nothing


def run_job(config: JobConfig, *, resume: bool = False) -> dict[str, Any]:
    """Run a job from text to report; its output folder appears when everything is in it.

    Args:
        resume: go on with an interrupted run of the same configuration, or with a finished one to
            more steps; a finished one is left as it is, and where nothing is the job starts.
    Returns:
        What `report.json` holds.
    Raises:
        UserError: anything in the configuration that cannot work.
    """
    quieten_libraries()
    check_open_sections(config)
    end_with_launcher()
    folder = WorkFolder(config)
    report = folder.finished_report() if resume else None
    if report is not None:
        JobConsole(is_main=is_main()).say(f"finished already: {folder.output}")
        return report
    job = _Job(config, folder)
    on_main(lambda: folder.open(resume=resume))
    try:
        report = job.run()
    except BaseException as error:
        hint = folder.leave() if is_main() else None
        if hint is not None:
            error.add_note(hint)
        raise
    if is_main():
        folder.finish()
    return report


def check_open_sections(config: JobConfig) -> None:
    """See every mistake in the sections that belong to a library before any work begins."""
    check_training(config.training, "training")
    for role, section in (("teacher", config.teacher), ("student", config.student)):
        if section.pretrain is not None:
            check_training(section.pretrain, f"{role}.pretrain", pretrain=True)
    if config.student.peft is not None:
        check_peft(config.student.peft, "student.peft")


class _Job:
    def __init__(self, config: JobConfig, folder: WorkFolder) -> None:
        self.config = config
        self.folder = folder
        self.work = folder.path
        self.models = Store()
        self.console = JobConsole(is_main=is_main())
        self.start = time.perf_counter()
        # those of an encoder are its own losses
        self.measured = config.loss if config.kind == "encoder" else _MEASURED
        # opens the process group, which must exist before processes wait for one another
        self.device = self._evaluation_args(self.measured).device

    def run(self) -> dict[str, Any]:
        config, console = self.config, self.console
        settle_threads(console.say)
        with console.phase("Data"):
            self.material = self._prepare_material()
        on_main(lambda: self.folder.check_data(self.material.digest))
        with console.phase("Teacher"):
            teacher, teacher_facts = self._prepare_teacher()
        runs = [self._run_seed(seed, teacher) for seed in config.seeds]
        report = {
            "modxfer_fast": __version__,
            "environment": environment(),
            "config": as_dict(config),
            "data": {
                "documents": len(self.documents.train),
                "held_out_documents": len(self.documents.held_out),
                "train_tokens": self.material.rows.train_tokens,
                "held_out_tokens": self.material.rows.held_out_tokens,
                "vocab_size": len(self.material.tokenizer),
            },
            "teacher": teacher_facts,
            "runs": runs,
        }
        if config.compare.loss_rows is not None:
            with console.phase("Loss: fused against dense"):
                report["loss"] = self._time_loss(runs[0], teacher)
        if config.compare.parts:
            with console.phase("Parts: each fused one against its plain counterpart"):
                report["parts"] = self._time_parts(runs[0], teacher)
        report["summary"] = summarise(report)
        report["phases"] = console.phase_seconds
        report["seconds"] = time.perf_counter() - self.start
        if is_main():
            write_json(self.work / REPORT_FILE, report)
            plot_curves(report, self.work / "curves.png")
        print_summary(console, report, Path(config.output_dir))
        return report

    def _prepare_material(self) -> Material:
        config = self.config
        documents = load_documents(config.data)
        tokenizer = prepare_tokenizer(config, documents)
        planned_configs(config, tokenizer)  # a mistake is told before the teacher trains
        rows = build_rows(documents, config.data, tokenizer, config.kind)
        self.documents = documents
        self.console.say(
            f"{len(documents.train)} documents, {rows.train_tokens:,} tokens; held out "
            f"{len(documents.held_out)} documents, {rows.held_out_tokens:,} tokens; "
            f"vocabulary {len(tokenizer):,}"
        )
        for note in rows.notes:
            self.console.say(note)
        digest = fingerprint(
            {
                "documents": documents.digest(),
                "data": config.data.model_dump(),
                "tokenizer": tokenizer_digest(tokenizer),
            }
        )
        packed = config.data.packing
        return Material(self.console, self.work, tokenizer, rows, packed, config.kind, digest)

    def _prepare_teacher(self) -> tuple[Teacher, dict[str, Any]]:
        section = self.config.teacher
        source = prepare_model(section, "teacher", self.material, self.models, seed=0)
        model = load_model(source.path, section, self.config.kind)
        check_finite(model, "teacher")
        if self.config.data.packing:
            check_packing(model.to(self.device), "teacher")
        check_rows_fit(model, self.material.tokenizer, self.config.data.max_length, "teacher")
        # an encoder has no figures without a student
        is_encoder = self.config.kind == "encoder"
        metrics = {} if is_encoder else self._evaluate(model, None)
        facts = {
            "path": source.path,
            "from_cache": source.cached,
            "parameters": model.num_parameters(),
            "pretrain": source.pretrain,
            **metrics,
        }
        self.console.say(
            f"{model.num_parameters() / 1e6:.2f} M parameters"
            + (" (from the cache)" if source.cached else "")
            + ("" if is_encoder else f", held-out perplexity {metrics['eval_perplexity']:.2f}")
        )
        num_tokens = len(self.material.tokenizer)
        return Teacher(model, kind=self.config.kind, num_tokens=num_tokens), facts

    def _run_seed(self, seed: int, teacher: Teacher) -> dict[str, Any]:
        config, console = self.config, self.console
        label = f" (seed {seed})" if len(config.seeds) > 1 else ""
        with console.phase(f"Student before training{label}"):
            start = self._start(seed, teacher)
            console.say(_figures(start))
        run = {"seed": seed, "start": start}
        for role, loss, title in _roles(config):
            with console.phase(f"{title}{label}"):
                run[role] = self._train(role, loss, seed, start["path"], teacher)
                console.say(_figures(run[role]))
        return run

    def _start(self, seed: int, teacher: Teacher) -> dict[str, Any]:
        """The student before training: its weights, its size, its distance from the teacher."""
        source = prepare_model(
            self.config.student,
            "student",
            self.material,
            self.models,
            seed=seed,
            vocab_size=teacher.vocab_size,
            teacher=teacher.model,
        )
        if self._base_of(seed) is not None:
            self._keep_base(source.path, seed)
        student = self._load_student(source.path, seed, tell=True)
        check_finite(student, "student")
        check_rows_fit(student, self.material.tokenizer, self.config.data.max_length, "student")
        if source.from_teacher is not None:
            self.console.say(_taken(source.from_teacher))
        self._check_features(student, teacher)
        if self.config.data.packing:
            check_packing(student.to(self.device), "student")
        return {
            "path": source.path,
            "from_cache": source.cached,
            "pretrain": source.pretrain,
            "from_teacher": source.from_teacher,
            "parameters": student.num_parameters(),
            "trainable_parameters": student.num_parameters(only_trainable=True),
            **self._evaluate(student, teacher, seed=seed),
        }

    def _load_student(
        self, path: str, seed: int, *, fuse_lora: bool = True, tell: bool = False
    ) -> PreTrainedModel:
        section = self.config.student
        model = load_model(path, section, self.config.kind)
        if section.peft is not None:
            model = apply_peft(model, section.peft, "student.peft", seed=seed)
            base = self._base_of(seed)
            if base is not None:
                model.peft_config[model.active_adapter].base_model_name_or_path = str(base)
        if section.fuses_lora and fuse_lora:
            report = patch_peft_model(model)
            for line in str(report).splitlines() if tell else ():
                self.console.say(line)
        return model

    def _base_of(self, seed: int) -> Path | None:
        """Where an adapter finds its base in the output, if that was made here.

        Such a path is absolute because PEFT takes another as relative to the current folder.
        """
        section = self.config.student
        if section.peft is None or not section.is_built:
            return None
        return self.folder.output / f"seed-{seed}" / "student_base"

    def _keep_base(self, path: str, seed: int) -> None:
        """Copy the base beside its adapters: the cache may be emptied, the output may travel."""
        if is_main():
            folder = self.work / f"seed-{seed}" / "student_base"
            with new_folder(folder, keep_existing=True) as scratch:
                shutil.copytree(path, scratch, dirs_exist_ok=True)

    def _check_features(self, student: PreTrainedModel, teacher: Teacher) -> None:
        """Raise a ConfigError unless the losses inside the networks fit the two models."""
        args = self._evaluation_args(self.config.loss)
        options = args.hidden_state_options(), args.relation_options()
        objective = None if self.config.kind == "encoder" else Objective()
        try:
            DistillModule(student, teacher, objective, *options)
        except (TypeError, ValueError) as error:
            in_loss = str(error).startswith(("hidden_states", "relations"))
            raise ConfigError(f"loss.{error}" if in_loss else str(error)) from error

    def _train(
        self, role: str, loss: LossSection, seed: int, path: str, teacher: Teacher
    ) -> dict[str, Any]:
        """One training run from the start weights, or its result when it was finished before."""
        folder = self.work / f"seed-{seed}"
        result_file = folder / f"{role}.json"
        if result_file.is_file():
            self.console.say("finished before the interruption")
            return _read_result(result_file)
        checkpoints = self.work / CHECKPOINTS / f"seed-{seed}" / role
        # before the student: under ZeRO-3 it is partitioned while it is loaded
        args = training_args(
            self.config.training,
            "training",
            checkpoints,
            loss,
            seed=seed,
            kind=self.config.kind,
        )
        trainer = self.material.trainer(self._load_student(path, seed), args, teacher)
        seconds = self.material.train(trainer)
        trainer.save_model(str(folder / role))
        barrier()  # the main process writes, every process reads it below
        history = trainer.state.log_history
        del trainer
        result = {
            "seconds": seconds,
            "tokens_per_s": _last(history, "tokens_per_s"),
            "peak_mem_mib": _last(history, "peak_mem_mib"),
            **_last_of_features(history),
            **self._evaluate(
                self._load_trained(folder / role, path), teacher, projections=folder / role
            ),
            "history": history,
        }
        barrier()
        if is_main():
            write_json(result_file, result)
        return result

    def _load_trained(self, folder: Path, start_path: str) -> PreTrainedModel:
        """The saved student, as anyone would load it."""
        section = self.config.student
        if section.peft is None:
            return load_model(str(folder), section, self.config.kind)
        return load_adapter(load_model(start_path, section, self.config.kind), folder)

    def _evaluate(
        self,
        model: PreTrainedModel,
        teacher: Teacher | None,
        *,
        seed: int = 0,
        projections: Path | None = None,
    ) -> dict[str, float]:
        """Held-out figures of a model.

        Of a causal language model eval_perplexity and, with a teacher, eval_kd: KL(teacher ||
        model) per token. Of an encoder eval_hidden_loss and the like.

        Args:
            seed: that projections start from. projections: folder of trained ones, for encoders.
        """
        args = self._evaluation_args(CROSS_ENTROPY if teacher is None else self.measured, seed)
        trainer = self.material.trainer(model, args, teacher)
        if self.config.kind == "encoder":
            if projections is not None:
                load_projections(projections, trainer.model.features)
            prefixes = ("eval_hidden_", "eval_relation_")
            return {k: v for k, v in trainer.evaluate().items() if k.startswith(prefixes)}
        metrics = trainer.evaluate()
        return {key: metrics[key] for key in ("eval_perplexity", "eval_kd") if key in metrics}

    def _evaluation_args(self, loss: LossSection, seed: int = 0) -> DistillConfig:
        config = self.config
        return evaluation_args(config.training, self.work, loss, seed=seed, kind=config.kind)

    def _time_loss(self, run: dict[str, Any], teacher: Teacher) -> dict[str, Any]:
        return time_losses(
            self._load_student(run["start"]["path"], run["seed"]),
            teacher,
            self._timed_batch(),
            self.config.loss,
            **self._timing_options(),
        )

    def _time_parts(self, run: dict[str, Any], teacher: Teacher) -> dict[str, Any]:
        path, seed = run["start"]["path"], run["seed"]
        plain = None
        if self.config.student.fuses_lora:
            plain = self._load_student(path, seed, fuse_lora=False)
        return time_parts(
            self._load_student(path, seed),
            plain,
            teacher,
            self._timed_batch(),
            self.config.loss,
            **self._timing_options(),
        )

    def _timed_batch(self) -> dict[str, Any]:
        rows = self.material.rows.train
        number = self.config.compare.loss_rows or _TIMED_ROWS
        return self.material.collator([rows[i % len(rows)] for i in range(number)])

    def _timing_options(self) -> dict[str, Any]:
        args = evaluation_args(self.config.training, self.work, _MEASURED)
        return {
            "repeats": self.config.compare.loss_repeats,
            "device": args.device,
            "autocast": torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None,
        }


def _roles(config: JobConfig) -> list[tuple[str, LossSection, str]]:
    """The runs of each seed: name in the report, loss, title. They differ in the loss alone."""
    compare, loss = config.compare, config.loss
    logits = loss.model_copy(update={"hidden_states": None, "relations": None})
    roles = [("student", loss, "Student, distilled")]
    if compare.parts and loss.has_features and loss.kd_weight:
        roles.insert(0, ("logit_kd", logits, "Student, distilled from logits alone"))
    if compare.ce_only or compare.parts:
        alone = logits.model_copy(update={"kd_weight": 0.0, "ce_weight": 1.0})
        roles.insert(0, ("ce_only", alone, "Student, cross entropy alone"))
    return roles


def _last(history: list[dict[str, Any]], key: str) -> float | None:
    return next((entry[key] for entry in reversed(history) if key in entry), None)


def _last_of_features(history: list[dict[str, Any]]) -> dict[str, float]:
    """The last held-out losses inside the networks; the saved student has no projections."""
    last = {name: _last(history, name) for name in ("eval_hidden_loss", "eval_relation_loss")}
    return {name: value for name, value in last.items() if value is not None}


def _read_result(path: Path) -> dict[str, Any]:
    """A finished run; JSON has no infinity, and a figure that was infinite became null."""
    result = read_json(path)
    keys = ("eval_perplexity", "eval_kd")
    infinite = {key: math.inf for key in keys if result.get(key, 0.0) is None}
    return {**result, **infinite}


def _figures(run: dict[str, Any]) -> str:
    if "eval_perplexity" not in run:
        return (
            f"held-out hidden loss {run['eval_hidden_loss']:.4g}, cosine to the teacher "
            f"{run['eval_hidden_cosine']:.4f}"
        )
    return (
        f"held-out perplexity {run['eval_perplexity']:.2f}, KL to the teacher {run['eval_kd']:.4f}"
    )


def _taken(weights: dict[str, Any]) -> str:
    """What a student took from its teacher, on one line."""
    text = f"from the teacher: {weights['copied']} tensors copied"
    if weights["projected"]:
        text += f", {weights['projected']} projected ({weights['energy']:.1%} of their energy)"
    return f"{text}, {len(weights['fresh'])} fresh"

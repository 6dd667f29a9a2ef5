"""`modxfer distill`: data, teacher, then per seed the start and the runs, then what they cost."""

import shutil
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from modxfer_fast.config import ConfigError, JobConfig, OnPolicySection
from modxfer_fast.config.model import MIXTURES, SERVED_WAYS, TeacherModelSection
from modxfer_fast.data import Corpus, build_rows, load_corpus, tokenizer_digest
from modxfer_fast.engine import (
    DistillModule,
    QuantizedTeacher,
    SelfDistillation,
    SeveralTeachers,
    ShardedTeacher,
    Teacher,
    TeacherProtocol,
    deepspeed,
)
from modxfer_fast.engine.on_policy.vllm import check_servable, served_lora
from modxfer_fast.engine.teachers.quantized import quantizer_of, stored_bytes
from modxfer_fast.files import new_folder, write_json
from modxfer_fast.jobs.cache.identity import check_listed_loss, open_cached, teacher_facts
from modxfer_fast.jobs.distill.arguments import (
    check_backends,
    check_best_metric,
    check_training,
    evaluation_args,
    of_processes,
)
from modxfer_fast.jobs.distill.card import write_card
from modxfer_fast.jobs.distill.hub import send
from modxfer_fast.jobs.distill.material import Evaluation, Material
from modxfer_fast.jobs.distill.models import (
    ModelSource,
    check_configs,
    model_stage,
    prepare_tokenizer,
)
from modxfer_fast.jobs.distill.runs import MODEL, Student, read_result, roles, run_stage
from modxfer_fast.jobs.distill.served import check_waits, open_served
from modxfer_fast.jobs.distill.summary import print_summary, summarise
from modxfer_fast.jobs.distill.timing import Timer, time_losses, time_parts
from modxfer_fast.jobs.job import Job, quieten_libraries
from modxfer_fast.jobs.output import REPORT_FILE, OutputStore, WorkFolder, link_tree
from modxfer_fast.jobs.ranks import end_with_launcher, is_main, on_main, world_size
from modxfer_fast.jobs.stage import Live, Stage, facts_of, fingerprint
from modxfer_fast.jobs.store import Store
from modxfer_fast.models import check_finite, check_packing, check_peft, check_rows_fit, load_model
from modxfer_fast.models.checks import num_elements
from modxfer_fast.report import JobConsole, plot_curves

_TIMED_ROWS = 32  # where compare.loss_rows says nothing


class DistillJob(Job):
    """A job from text to report, which every process of a launcher runs.

    Models that it builds are in the cache. What its runs leave is in its unfinished output, and
    their checkpoints stay in the finished one.
    """

    command = "modxfer distill"

    def __init__(
        self, config: JobConfig, console: JobConsole | None = None, store: Store | None = None
    ) -> None:
        super().__init__(config, console, store)
        self.folder = WorkFolder(config)
        self.runs = OutputStore(self.folder.path)
        self.processes = world_size()  # that the job began with

    def check(self) -> None:
        config = self.config
        check_training(config.training, "training")
        check_waits(config)
        losses = [loss for _, _, loss in roles(config)]
        metric = config.training.get("metric_for_best_model")
        check_best_metric(metric, losses, has_logits=config.kind == "causal_lm")
        for role, section in (*config.teacher_sections.items(), ("student", config.student)):
            if section.pretrain is not None:
                check_training(section.pretrain, f"{role}.pretrain", pretrain=True)
        if config.training.get("push_to_hub") and len(config.seeds) > 1:
            raise ConfigError(
                "training.push_to_hub: expected one seed, whose student is sent, got "
                f"{len(config.seeds)}"
            )
        if config.student.peft is not None:
            peft, fields = check_peft(config.student.peft, "student.peft")
            if config.on_policy is not None and config.on_policy.vllm is not None:
                check_servable(peft(**fields), "student.peft")
        for role, section in config.teacher_sections.items():
            if section.plan == "quantized":
                check_quantizer(section)
            if section.plan == "served" and section.served is not None:
                check_listed_loss(config, section.served.tail, f"{role}.served.tail: renormalise")

    def run(self, *, until: str | None = None, resume: bool = False) -> dict[str, Any]:
        """As of every job, but a part of this one is of no use alone: `until` names no stage.

        With `resume` it goes on with an interrupted run of the same configuration, or with a
        finished one to more steps; a finished one is left as it is, and where nothing is it starts.
        """
        if until is not None:
            raise ConfigError(f"{self.command}: expected no stage to stop after, got {until}")
        quieten_libraries()
        self.check()
        end_with_launcher()
        folder, config = self.folder, self.config
        report = folder.finished_report() if resume else None
        if report is not None:
            self.console.say(f"finished already: {folder.output}")
            return report
        device = self.open_process_group()
        check_backends(config.loss, device, has_logits=config.kind == "causal_lm")
        on_main(lambda: folder.open(resume=resume))
        try:
            report = self.whole_report()
            if is_main():
                write_json(folder.path / REPORT_FILE, report)
                self.write(folder.path, report)
            self.summarise(report, Path(config.output_dir))
        except BaseException as error:
            hint = folder.leave() if is_main() else None
            if hint is not None:
                error.add_note(hint)
            raise
        if is_main():
            folder.finish()
            if config.training.get("push_to_hub"):
                student = folder.output / f"seed-{config.seeds[0]}" / "student"
                address = send(student, config.training, folder.output.name)
                self.console.say(f"sent to {address}")
        return report

    def open_process_group(self) -> torch.device:
        """It must exist before processes wait for one another; this one's device."""
        config = self.config
        path = self.folder.path
        return evaluation_args(config.training, path, config.loss, kind=config.kind).device

    def stages(self) -> Mapping[str, Callable[[], Stage | None]]:
        """Each teacher; what follows depends on them."""
        sections = self.config.teacher_sections.items()
        return {role: partial(self._teacher_stage, role, one) for role, one in sections}

    def report(self) -> dict[str, Any]:
        config, console = self.config, self.console
        self._settle_processes()
        self._check_vllm()
        with console.phase("Data"):
            material = self.material
        on_main(lambda: self.folder.check_data(material.digest))
        with console.phase("Teacher"):
            teacher, teacher_facts = self._prepare_teacher()
        seeds = (self._run_seed(seed, teacher) for seed in config.seeds)
        (first, *_), runs = zip(*seeds, strict=True)
        report = {
            "data": {
                "documents": self.documents.num_train,
                "held_out_documents": self.documents.num_held_out,
                "train_tokens": material.rows.train_tokens,
                "held_out_tokens": material.rows.held_out_tokens,
                "vocab_size": len(material.tokenizer),
            },
            "teacher": teacher_facts,
            "runs": list(runs),
        }
        if config.compare.loss_rows is not None:
            with console.phase("Loss: fused against dense"):
                report["loss"] = self._timed(time_losses, first, teacher.value)
        if config.compare.parts:
            with console.phase("Parts: each fused one against its plain counterpart"):
                plain = first.load(fuse_lora=False) if first.section.fuses_lora else None
                measure = partial(time_parts, plain_student=plain)
                report["parts"] = self._timed(measure, first, teacher.value)
        report["summary"] = summarise(config, report)
        report["phases"] = console.phase_seconds
        return report

    def _check_vllm(self) -> None:
        """See that the server that is to write completions can, before anything long begins."""
        section = self._on_policy
        if section is not None and section.vllm is not None:
            served, length = served_lora(section.vllm), section.max_length
            assert length is not None  # it is that of the job
            on_main(lambda: served.check(length))

    def _settle_processes(self) -> None:
        self.processes, now = on_main(self.folder.processes), world_size()
        if self.processes == now:
            return
        training = of_processes(self.config.training, self.processes, now)
        self.console.say(
            f"began with {self.processes} processes and goes on with {now}: "
            f"gradient_accumulation_steps is {training['gradient_accumulation_steps']}, so that "
            "a step keeps its rows; figures agree within rounding where nothing is drawn, as "
            "dropout is"
        )

    def write(self, folder: Path, report: dict[str, Any]) -> None:
        plot_curves(report, folder / "curves.png")
        for model in self.runs.root.glob(f"*/*/{MODEL}"):
            link_tree(model, folder / model.parent.relative_to(self.runs.root))
        for run in report["runs"]:
            write_card(folder / f"seed-{run['seed']}" / "student", self.config, report, run)

    def summarise(self, report: dict[str, Any], output: Path) -> None:
        print_summary(self.console, report, output)

    # ---- data and models ----

    @cached_property
    def documents(self) -> Corpus:
        documents = load_corpus(self.config.data, tuple(self.config.teachers or ()))
        section = self.config.on_policy
        has_prompts = all(part.train_format != "text" for part in documents.parts)
        if section is not None and section.prompt_length is None and not has_prompts:
            raise ConfigError(
                "on_policy.prompt_length: expected a number of tokens, because the data is plain "
                "text without prompts; or data with prompt and completion, or messages"
            )
        return documents

    @property
    def _on_policy(self) -> OnPolicySection | None:
        """The section, with the lengths of the job."""
        section = self.config.on_policy
        if section is None or section.max_length is not None:
            return section
        return section.model_copy(update={"max_length": self.config.data.max_length})

    @cached_property
    def material(self) -> Material:
        config, documents, say = self.config, self.documents, self.console.say
        tokenizer = prepare_tokenizer(config, documents)
        check_configs(config, tokenizer)  # a mistake is told before the teacher trains
        rows = build_rows(documents, config.data, tokenizer, config.kind)
        learnt = "documents as they come"
        if rows.train_tokens is not None:
            learnt = f"{documents.num_train} documents, {rows.train_tokens:,} tokens"
        say(
            f"{learnt}; held out {documents.num_held_out} documents, "
            f"{rows.held_out_tokens:,} tokens; vocabulary {len(tokenizer):,}"
        )
        for note in rows.notes:
            say(note)
        facts = {"documents": documents.digest(), "data": config.data.model_dump()}
        digest = fingerprint({**facts, "tokenizer": tokenizer_digest(tokenizer)})
        return Material(
            self.console,
            self.folder.path,
            tokenizer,
            rows,
            config.kind,
            digest,
            self.processes,
        )

    @cached_property
    def evaluation(self) -> Evaluation:
        return Evaluation(self.material, self.config.training, self.config.loss)

    def _teacher_stage(self, role: str, section: TeacherModelSection) -> Stage | None:
        return model_stage(section, role, self.material, seed=0)

    def teacher_source(
        self, role: str = "teacher", section: TeacherModelSection | None = None
    ) -> ModelSource:
        """Where the weights of a teacher come from, made if its stage was not run before."""
        section = section or self.config.teacher_sections[role]
        stage = self._teacher_stage(role, section)
        return ModelSource.of(section, stage, self.store, self.console)

    def load_teacher(self, source: ModelSource, role: str = "teacher") -> PreTrainedModel:
        """A teacher's model, looked at; of a divided one this process has its part."""
        section = self.config.teacher_sections[role]
        if section.stored_as is not None:
            check_quantizer(section)
        loading: Any = nullcontext()
        if section.is_divided:
            loading = deepspeed.loading_in_parts(offload=section.plan.endswith("offload"))
        with loading:
            model = load_model(source.path, section, self.config.kind)
        self._check_model(model, role, packing=section.stored_as is None)
        return model

    def _prepare_teacher(self) -> tuple[Live, dict[str, Any]]:
        """What the student learns from, told by where its weights come from, with facts and
        figures."""
        config = self.config
        prepared = {
            role: self._prepare_one(role, section)
            for role, section in config.teacher_sections.items()
        }
        if config.teachers is None:
            return prepared["teacher"]
        several = several_teachers(
            config, {role: live.value for role, (live, _) in prepared.items()}
        )
        found = dict(zip(config.teachers, prepared.values(), strict=True))
        told: dict[str, Any] = {"of": several.of}
        if several.of != "route":
            told["weights"] = dict(zip(several.teachers, several.weights, strict=True))
        identity = [[name, live.identity] for name, (live, _) in found.items()]
        facts = {**told, "teachers": {name: facts for name, (_, facts) in found.items()}}
        return Live(several, [told, identity]), facts

    def _prepare_one(self, role: str, section: TeacherModelSection) -> tuple[Live, dict[str, Any]]:
        config = self.config
        if section.is_student:
            itself = SelfDistillation(section.source, section.ema_decay)
            self.console.say(f"the student's own network, source {itself.source}")
            told = {"plan": section.plan, **asdict(itself)}
            return Live(itself, told), told
        if section.plan not in ("served", "cached"):
            return self._prepare_loaded(role)
        source = self.teacher_source(role, section)
        facts = _facts_of(source, section)
        if section.served is not None and section.plan == "served":
            served, asked = open_served(config, self.material, role), section.served
            self.console.say(f"{asked.model} behind {asked.url}, {asked.top_k} classes a token")
            facts |= asked.model_dump(include={"url", "model", "top_k"})
            answers = asked.model_dump(exclude=set(SERVED_WAYS))
            told = teacher_facts(source, section, self.material.tokenizer)
            return Live(served, [told, answers]), facts
        cached = open_cached(config, source, self.material, role)
        cache = cached.cache
        self.console.say(
            f"answers to {len(cache):,} documents, {cache.num_tokens:,} tokens, by "
            f"{cached.signal}, in {cache.folder}"
        )
        facts |= {"documents": len(cache), "tokens": cache.num_tokens, "signal": cached.signal}
        return Live(cached, [source, facts_of(section.cache)]), facts

    def _prepare_loaded(self, role: str) -> tuple[Live, dict[str, Any]]:
        """A teacher whose weights this job holds."""
        section = self.config.teacher_sections[role]
        source = self.teacher_source(role, section)
        facts = _facts_of(source, section)
        model = self.load_teacher(source, role)
        parameters, stored_as = num_elements(model), section.stored_as
        quantized = None if stored_as is None else self.make_teacher(model, role)
        # without logits there are no figures without a student
        metrics = self.evaluation.figures(model, None) if self.evaluation.has_logits else {}
        facts |= {"parameters": parameters, **metrics}
        self.console.say(
            ("" if role == "teacher" else f"{role}: ")
            + f"{parameters / 1e6:.2f} M parameters"
            + (" (from the cache)" if source.cached else "")
            + (f", held-out perplexity {metrics['eval_perplexity']:.2f}" if metrics else "")
        )
        if quantized is not None:
            facts |= {"quantization": stored_as, "parameter_bytes": stored_bytes(model)}
            self.console.say(
                f"blocks in {stored_as}: {facts['parameter_bytes'] / 2**20:,.1f} MiB of parameters"
            )
            return Live(quantized, [source, stored_as]), facts
        return Live(self.make_teacher(model, role), source), facts

    def make_teacher(self, model: PreTrainedModel, role: str = "teacher") -> Teacher:
        """The teacher of a loaded model, as the plan of its section has it."""
        section = self.config.teacher_sections[role]
        make: Any = ShardedTeacher if section.is_divided else Teacher
        if section.stored_as is not None:
            make = partial(QuantizedTeacher, quantization=section.stored_as)
        teacher = make(model, kind=self.config.kind, num_tokens=len(self.material.tokenizer))
        if section.stored_as is not None:  # which, whole, may be too large for the device
            self._check_packing(model, role)
        return teacher

    def _teacher_model(self, teacher: TeacherProtocol) -> PreTrainedModel | None:
        """What a student's `from_teacher` takes from, None where there is no such section."""
        if self.config.student.from_teacher is None:
            return None
        if type(teacher) is Teacher:
            return teacher.model
        return load_model(self.teacher_source().path, self.config.teacher, self.config.kind)

    def _check_model(self, model: PreTrainedModel, role: str, *, packing: bool = True) -> None:
        check_finite(model, role)
        check_rows_fit(model, self.material.tokenizer, self.config.data.max_length, role)
        if packing:
            self._check_packing(model, role)

    def _check_packing(self, model: PreTrainedModel, role: str) -> None:
        if self.config.data.packing:
            with deepspeed.gathered_on_call(model):
                check_packing(model.to(self.evaluation.args().device), role)

    # ---- the runs of a seed ----

    def _run_seed(self, seed: int, teacher: Live) -> tuple[Student, dict[str, Any]]:
        console, run = self.console, dict[str, Any](seed=seed)
        label = f" (seed {seed})" if len(self.config.seeds) > 1 else ""
        with console.phase(f"Student before training{label}"):
            student, run["start"] = self._start(seed, teacher.value)
            console.say(_figures(run["start"]))
        for role, title, loss in roles(self.config):
            stage = run_stage(
                role, title + label, loss, student, teacher, self.evaluation, self._on_policy
            )
            run[role] = read_result(self.runs.get(stage, console))
            console.say(_figures(run[role]))
        return student, run

    def _start(self, seed: int, teacher: Any) -> tuple[Student, dict[str, Any]]:
        """The student before training; its weights, its size, its distance from the teacher."""
        config = self.config
        stage = model_stage(
            config.student,
            "student",
            self.material,
            seed=seed,
            vocab_size=None if isinstance(teacher, SelfDistillation) else teacher.classes,
            teacher=self._teacher_model(teacher),
        )
        source = ModelSource.of(config.student, stage, self.store, self.console)
        base = None
        if config.student.peft is not None and config.student.is_built:
            base = self.folder.output / f"seed-{seed}" / "student_base"
            self._keep_base(source.path, seed)
        student = Student(config.student, config.kind, seed, source, base)
        with self.evaluation.loading():
            model = student.load(tell=self.console.say)
        self._check_model(model, "student")
        if source.from_teacher is not None:
            self.console.say(_taken(source.from_teacher))
        self._check_features(model, teacher)
        return student, {
            "path": source.path,
            "from_cache": source.cached,
            "pretrain": source.pretrain,
            "from_teacher": source.from_teacher,
            "parameters": num_elements(model),
            "trainable_parameters": num_elements(model, only_trainable=True),
            **self.evaluation.figures(model, teacher, seed=seed),
        }

    def _keep_base(self, path: str, seed: int) -> None:
        """Copy the base beside its adapters: the cache may be emptied, the output may travel."""
        if is_main():
            folder = self.folder.path / f"seed-{seed}" / "student_base"
            with new_folder(folder, keep_existing=True) as scratch:
                shutil.copytree(path, scratch, dirs_exist_ok=True)

    def _check_features(self, student: PreTrainedModel, teacher: Any) -> None:
        """Raise a ConfigError unless the losses inside the networks fit the two models."""
        args = self.evaluation.args(self.config.loss)
        options = args.hidden_state_options(), args.relation_options()
        try:
            DistillModule(student, teacher, args.objective(), *options, kind=args.kind)
        except (TypeError, ValueError) as error:
            in_loss = str(error).startswith(("hidden_states", "relations"))
            raise ConfigError(f"loss.{error}" if in_loss else str(error)) from error

    # ---- what a step costs ----

    def _timed(
        self, measure: Callable[..., dict[str, Any]], student: Student, teacher: Teacher
    ) -> dict[str, Any]:
        compare, rows, args = self.config.compare, self.material.rows, self.evaluation.args()
        number = compare.loss_rows or _TIMED_ROWS
        batch = rows.collator(rows.some(number))
        batch = {k: v.to(args.device) if torch.is_tensor(v) else v for k, v in batch.items()}
        autocast = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
        timer = Timer(compare.loss_repeats, args.device, autocast)
        teacher.to(args.device)
        return measure(student.load(), teacher, batch, self.config.loss, timer)


def several_teachers(config: JobConfig, teachers: Mapping[str, Any]) -> SeveralTeachers:
    """The teachers of a job, by the paths of their sections, together as it says."""
    assert config.teachers is not None
    given = {name: one.weight for name, one in config.teachers.items()}
    weights = {name: weight for name, weight in given.items() if weight is not None}
    of = "route" if config.is_routed else config.mixture_of or MIXTURES[0]
    named = {name: teachers[f"teachers.{name}"] for name in config.teachers}
    return SeveralTeachers(named, weights, of)


def check_quantizer(section: TeacherModelSection) -> None:
    """Raise a ConfigError where what stores the teacher in fewer bits is not installed."""
    try:
        quantizer_of(section.stored_as or "")
    except ImportError as error:
        raise ConfigError(str(error)) from error


def _facts_of(source: ModelSource, section: TeacherModelSection) -> dict[str, Any]:
    return {
        "path": source.path,
        "from_cache": source.cached,
        "plan": section.plan,
        "pretrain": source.pretrain,
    }


def _figures(run: dict[str, Any]) -> str:
    if "eval_perplexity" in run:
        perplexity, kd = run["eval_perplexity"], run["eval_kd"]
        return f"held-out perplexity {perplexity:.2f}, KL to the teacher {kd:.4f}"
    loss, cosine = run["eval_hidden_loss"], run["eval_hidden_cosine"]
    return f"held-out hidden loss {loss:.4g}, cosine to the teacher {cosine:.4f}"


def _taken(weights: dict[str, Any]) -> str:
    """What a student took from its teacher, on one line."""
    text = f"from the teacher: {weights['copied']} tensors copied"
    if weights["projected"]:
        text += f", {weights['projected']} projected ({weights['energy']:.1%} of their energy)"
    return f"{text}, {len(weights['fresh'])} fresh"

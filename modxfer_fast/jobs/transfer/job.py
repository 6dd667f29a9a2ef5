"""The stages of `modxfer transfer`: teacher, statistics, maps, module, student.

Every stage leaves a folder in the cache, under a fingerprint of all that it depends on, so that it
is skipped where the same was done before: in an interrupted run, another job or a cell of a grid.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, PeftType
from transformers import PreTrainedModel

from modxfer_fast.config import ConfigError
from modxfer_fast.config.transfer import FRESH, TransferConfig, TransferSection
from modxfer_fast.data.tasks import PRIMARY_METRIC, TaskData
from modxfer_fast.engine.tasks.distillation import distil_task
from modxfer_fast.engine.tasks.result import TaskResult
from modxfer_fast.engine.tasks.trainer import check_task_training, evaluate_task
from modxfer_fast.files import read_json, write_json
from modxfer_fast.jobs.cache import StageCache, Stages
from modxfer_fast.jobs.task.models import (
    ADAPTER,
    JobModel,
    device_of,
    examples,
    examples_digest,
    folder_digest,
    task_collator,
    with_fraction,
)
from modxfer_fast.jobs.task.stages import (
    RESULT,
    TaskTeacher,
    check_teacher,
    split_steps,
    train_stage,
)
from modxfer_fast.jobs.transfer.refine import hidden_options, text_rows
from modxfer_fast.models import Architecture, patch_peft_model
from modxfer_fast.report import ConsoleCallback, JobConsole
from modxfer_fast.transfer import (
    DATA_FREE_METHODS,
    PROVENANCE,
    LayerMap,
    MapOptions,
    Maps,
    Pairing,
    PeftModuleState,
    Statistics,
    collect_statistics,
    fit_maps,
    fresh_config,
    fresh_module,
    make_layer_map,
    reference_options,
    save_adapter,
    transport,
    verify,
)
from modxfer_fast.transfer.heads import rewrite_head
from modxfer_fast.transfer.kept import warnings

CONTENT = "content"


@dataclass(frozen=True)
class StudentRun:
    """A trained student.

    folder: in the cache. result: its scores. steps_before: of refinement, which count before those
    of `result`. module: folder of the module that it started from, None from scratch.
    """

    folder: Path
    result: TaskResult
    steps_before: int
    module: Path | None


class TransferJob:
    """One job; every property is a stage, made when it is first asked for.

    Args:
        job: what to do.
        console: told which stages run and which come from the cache.
        cache: where they are; jobs of one grid share it.
    """

    def __init__(
        self, job: TransferConfig, console: JobConsole, cache: StageCache | None = None
    ) -> None:
        self.job = job
        self.console = console
        self.stages = Stages(console, cache)
        self.kind = job.task.kind
        self.metric = PRIMARY_METRIC[self.kind]

    def check(self) -> None:
        """See every mistake in the sections that belong to a library before any work begins.

        Raises:
            ConfigError, ModelError: naming the place.
        """
        job = self.job
        check_teacher(job.teacher)
        check_task_training(split_steps(job.student.training)[0], "student.training")
        if job.transfer is not None and job.transfer.refine is not None:
            check_task_training(job.transfer.refine.training, "transfer.refine.training")

    # ---- data ----

    @cached_property
    def data(self) -> TaskData:
        """The student's examples."""
        return examples(self.job.task)

    @cached_property
    def labels(self) -> tuple[str, ...]:
        return self.data.labels

    @cached_property
    def texts(self) -> list:
        """The texts that statistics and refinement read, without labels."""
        labelled = examples(self._teacher.task).texts("train")
        if self.transfer.texts == "train":
            return labelled
        every = examples(with_fraction(self.job.task, 1.0))
        seen = {tuple(text) for text in [*labelled, *self.data.texts("train")]}
        seen |= {tuple(text) for split in ("validation", "test") for text in every.texts(split)}
        unseen = [text for text in every.texts("train") if tuple(text) not in seen]
        if not unseen:
            raise ConfigError(
                "transfer.texts: expected training examples that neither the teacher nor the "
                "student has labels of, got none"
            )
        return unseen

    @cached_property
    def _texts_digest(self) -> str:
        return hashlib.sha256(json.dumps(self.texts).encode()).hexdigest()[:20]

    # ---- models ----

    @cached_property
    def _teacher(self) -> TaskTeacher:
        section = self.job.teacher
        model = JobModel(section, self.kind, self.labels, section.seed, self._device)
        return TaskTeacher(model, self.job.task, self.stages)

    @cached_property
    def _student(self) -> JobModel:
        return JobModel(self.job.student, self.kind, self.labels, self.job.seed, self._device)

    @property
    def _models(self) -> dict[str, JobModel]:
        return {"teacher": self._teacher.model, "student": self._student}

    @property
    def _device(self) -> torch.device:
        return device_of(self.job.student.training)

    @property
    def _architectures(self) -> tuple[Architecture, Architecture]:
        """Of the student and of the teacher."""
        return self._student.architecture, self._teacher.model.architecture

    @property
    def teacher(self) -> Path:
        """Folder with the teacher's module and `result.json`, its scores."""
        return self._teacher.folder

    @property
    def teacher_score(self) -> float:
        """The teacher's test score."""
        return self._teacher.score

    # ---- transfer ----

    @property
    def transfer(self) -> TransferSection:
        if self.job.transfer is None:
            raise ConfigError("transfer: expected a section for this stage, got null")
        return self.job.transfer

    @cached_property
    def module_state(self) -> PeftModuleState:
        """The teacher's module."""
        return PeftModuleState.from_folder(
            self.teacher / ADAPTER,
            self._teacher.model.skeleton,
            any_base=True,  # the same model may have another path today
        )

    @cached_property
    def layer_map(self) -> LayerMap:
        section = self.transfer
        sizes = tuple(parts.num_layers for parts in self._architectures)
        cka = None
        if section.layers == "cka":
            cka = Statistics.load(self._collect(("layer_out",), "all") / CONTENT).cka()
        return make_layer_map(section.layers, *sizes, layers=section.sources, cka=cka)

    @cached_property
    def _output_map(self) -> LayerMap:
        """Blocks whose outputs correspond: the last of every group."""
        return make_layer_map("skip_last", *(parts.num_layers for parts in self._architectures))

    @property
    def _matches_outputs(self) -> bool:
        refine = self.transfer.refine
        return refine is not None and refine.hidden_weight > 0

    @cached_property
    def statistics(self) -> Path | None:
        """Folder with the moments of both models, None where nothing is fitted on them."""
        section = self.transfer
        methods = {section.method, section.map_of_head} - {FRESH, None}
        needs_data = not methods <= set(DATA_FREE_METHODS)
        if not (needs_data or self._matches_outputs):
            return None
        spaces = list(self._map_options().sites(self.module_state.spaces))
        pairs = list(self.layer_map.pairs)
        if self._matches_outputs or self._head_is_apart:
            spaces.append("layer_out")
            pairs += self._output_map.pairs
        if section.head == "transport":
            spaces.append("layer_out")
            pairs.append(tuple(parts.num_layers - 1 for parts in self._architectures))
        return self._collect(tuple(dict.fromkeys(spaces)), sorted(set(pairs)))

    def _collect(self, spaces: tuple[str, ...], pairs: list[tuple[int, int]] | str) -> Path:
        job, section = self.job, self.transfer.statistics
        facts = {
            "teacher": self._teacher.model.identity,
            "module": folder_digest(self.teacher / ADAPTER) if section.module_active else None,
            "student": self._student.identity,
            "texts": self._texts_digest,
            "max_length": job.task.max_length,
            "section": section.model_dump(),
            "spaces": spaces,
            "pairs": pairs,
        }
        return self.stages.get(
            "statistics", facts, lambda folder: self._run_statistics(folder, spaces, pairs)
        )

    def _run_statistics(self, folder: Path, spaces, pairs) -> None:
        section = self.transfer.statistics
        pairing = Pairing(
            section.pairing, section.pooling, self.job.task.max_length, section.batch_size
        )
        batches = pairing.batches(
            self.texts[: section.examples],
            self._teacher.model.tokenizer,
            self._student.tokenizer,
        )
        with self.console.progress(len(batches)) as progress:
            statistics = collect_statistics(
                self._teacher.load(),
                self._student.load(),
                batches,
                layer_pairs=pairs,
                spaces=spaces,
                held_out_every=section.held_out_every,
                module_active=section.module_active,
                progress=progress,
            )
        facts = statistics.facts
        self.console.say(
            f"{facts['tokens']:,} rows and {facts['held_out_tokens']:,} held out, "
            f"{facts['kept_fraction']:.1%} of the student's tokens"
        )
        statistics.save(folder / CONTENT)

    @cached_property
    def maps(self) -> Path | None:
        """Folder with the maps of the module's spaces, None where none are used."""
        if self.transfer.method == FRESH:
            return None
        section = self.transfer
        return self._fit(
            section.method,
            self._map_options(),
            self.layer_map,
            head=section.head == "transport" and not self._head_is_apart,
        )

    @property
    def _head_is_apart(self) -> bool:
        """Whether the head is mapped by another method than the module."""
        return self.transfer.map_of_head not in (None, self.transfer.method)

    @cached_property
    def _head_maps(self) -> Path | None:
        """Folder with maps of the block outputs for the head, None where `maps` has them."""
        if not self._head_is_apart:
            return None
        return self._fit(self.transfer.map_of_head, MapOptions(), self._output_map, ("layer_out",))

    def _fit(
        self,
        method: str,
        options: MapOptions,
        layer_map: LayerMap,
        spaces: tuple[str, ...] | None = None,
        *,
        head: bool = False,
    ) -> Path:
        """Maps for the teacher's module, or for `spaces` alone."""
        job = self.job
        module = self.module_state if spaces is None else None
        # the others depend on no seed, and so serve all of them
        seed = job.seed if method in ("shuffled", "random_matched") else 0
        projections = None
        if method == "kd_projection":
            projections = Path(job.student.projections or job.student.path).expanduser()
        facts = {
            "statistics": self.statistics and self.statistics.name,
            "teacher": self._teacher.model.identity,
            "student": self._student.identity,
            "projections": projections and folder_digest(projections),
            "layer_map": layer_map.facts(),
            "method": method,
            "options": asdict(options.resolved(module)),
            "spaces": module.spaces if spaces is None else spaces,
            "head": head,
            "seed": seed,
        }

        def build(folder: Path) -> None:
            with self.console.progress(None) as progress:
                maps = fit_maps(
                    self._load_statistics(),
                    layer_map,
                    method,
                    teacher=self._teacher.load().get_base_model(),
                    student=self._student.load(),
                    module=module,
                    spaces=spaces,
                    options=options,
                    head=head,
                    projections=projections,
                    seed=seed,
                    progress=progress,
                )
            maps.save(folder / CONTENT)

        return self.stages.get("maps", facts, build)

    def _load_statistics(self) -> Statistics | None:
        return None if self.statistics is None else Statistics.load(self.statistics / CONTENT)

    def _map_options(self) -> MapOptions:
        section = self.transfer
        if section.preset == "reference":
            return reference_options(self.module_state.config.peft_type)
        chosen = {} if section.measured_at is None else {"measured_at": section.measured_at}
        return MapOptions(
            scope=section.scope,
            head_aware=section.head_aware,
            scale=section.scale,
            write=section.write,
            **chosen,
        )

    @cached_property
    def module(self) -> Path:
        """Folder whose `adapter` is the student's module before training, verified."""
        job, section = self.job, self.transfer
        facts = {
            "teacher": self.teacher.name,
            "maps": self.maps and self.maps.name,
            "student": self._student.identity,
            "labels": self.labels,
            "head": section.head,
            "head_maps": self._head_maps and self._head_maps.name,
            "seed": job.seed,
        }
        moved = self.stages.get("module", facts, self._move)
        if section.refine is None:
            return moved
        facts = {
            "module": moved.name,
            "refine": section.refine.model_dump(),
            "outputs": self._output_maps and self._output_maps.name,
            "texts": self._texts_digest,
        }
        return self.stages.get("refined", facts, lambda folder: self._refine(moved, folder))

    def _move(self, folder: Path) -> None:
        student = self._student.load()
        head_maps = self._head_maps and Maps.load(self._head_maps / CONTENT)
        if self.transfer.method == FRESH:
            head = head_maps and rewrite_head(
                self.module_state, head_maps, self._student.architecture
            )
            self._student.save(self._fresh(student, head), folder)
            self._verify(folder)
            return
        module = transport(
            self.module_state,
            Maps.load(self.maps / CONTENT),
            self.layer_map,
            student,
            statistics=self._load_statistics(),
            head=self.transfer.head,
            head_maps=head_maps,
        )
        for line in [*warnings(module.facts["kept"]), *module.facts["notes"]]:
            self.console.say(line)
        if left_out := module.facts["layers_left_out"]:
            self.console.say(
                f"layers: {self.transfer.layers} takes nothing from the module's teacher layers "
                f"{', '.join(map(str, left_out))}"
            )
        save_adapter(
            module,
            student,
            folder / ADAPTER,
            provenance={
                "models": {
                    role: {"path": model.section.path, **model.identity}
                    for role, model in (
                        ("teacher", self._teacher.model),
                        ("student", self._student),
                    )
                },
                "seed": self.job.seed,
            },
        )
        self._student.note_task(folder / ADAPTER)
        self._verify(folder)

    def _verify(self, folder: Path) -> None:
        """That the student loads all of the module in a stage's folder."""
        report = verify(folder / ADAPTER, self._student.load(), any_base=True)
        self.console.say(
            f"{len(report.loaded)} tensors, {report.parameters:,} parameters, all loaded; "
            f"they change the output by {report.change:.1%}"
        )

    @cached_property
    def _fresh_config(self) -> PeftConfig:
        layer_map = make_layer_map("skip", *(parts.num_layers for parts in self._architectures))
        if self.job.transfer is not None and self.transfer.method != FRESH:
            layer_map = self.layer_map
        return fresh_config(self.module_state, self._student.skeleton, layer_map)

    def _fresh(
        self, student: PreTrainedModel, head: Mapping[str, torch.Tensor] | None = None
    ) -> PeftModel:
        return fresh_module(self._fresh_config, student, seed=self.job.seed, head=head)

    @cached_property
    def _output_maps(self) -> Path | None:
        """Folder with the maps of the block outputs that refinement compares.

        Regressions whatever the method, so that methods differ in the module that they move alone.
        """
        if not self._matches_outputs:
            return None
        return self._fit("ridge", MapOptions(), self._output_map, ("layer_out",))

    def _refine(self, moved: Path, folder: Path) -> None:
        job, section = self.job, self.transfer.refine
        hidden = None
        if self._output_maps is not None:
            hidden = hidden_options(
                Maps.load(self._output_maps / CONTENT), self._output_map, section.hidden_weight
            )
        model = self._student.load_with(moved / ADAPTER, trainable=True)
        distil_task(
            model,
            self._teacher.load(),
            text_rows(self.texts),
            task_collator(self._student, self._teacher.model, job.task.max_length),
            section.training,
            seed=job.seed,
            output_dir=folder / "checkpoints",
            temperature=section.temperature,
            scale_by_temperature_squared=section.scale_by_temperature_squared,
            hidden=hidden,
            callbacks=[ConsoleCallback(self.console)],
            where="transfer.refine.training",
        )
        self._student.save(model, folder)
        self._verify(folder)
        provenance = moved / ADAPTER / PROVENANCE
        facts = json.loads(provenance.read_text()) if provenance.is_file() else {}
        write_json(folder / ADAPTER / PROVENANCE, {**facts, "refine": section.model_dump()})

    # ---- student ----

    @cached_property
    def student(self) -> StudentRun:
        """The student trained from the moved module."""
        return self._run_student(self.module)

    @cached_property
    def scratch(self) -> StudentRun:
        """The student trained from a module as PEFT initialises it."""
        return self._run_student(None)

    def _run_student(self, module: Path | None) -> StudentRun:
        job = self.job
        training, test_steps = self._training(scratch=module is None)
        facts = {
            "module": module and module.name,
            "peft": None if module else self._fresh_config.to_dict(),
            "student": self._student.identity,
            "task": examples_digest(job.task),
            "max_length": job.task.max_length,
            "training": training,
            "test_steps": test_steps,
            "fused_lora": job.student.fused_lora,
            "seed": job.seed,
        }
        folder = self.stages.get(
            "student", facts, lambda folder: self._train_student(module, folder)
        )
        result = TaskResult.from_dict(read_json(folder / RESULT))
        return StudentRun(folder, result, job.steps_before(scratch=module is None), module)

    def _train_student(self, module: Path | None, folder: Path) -> None:
        job = self.job
        training, test_steps = self._training(scratch=module is None)
        if module is None:
            model = self._fresh(self._student.load())
        else:
            model = self._student.load_with(module / ADAPTER, trainable=True)
        is_lora = model.active_peft_config.peft_type == PeftType.LORA
        if job.student.fused_lora or (job.student.fused_lora is None and is_lora):
            for line in str(patch_peft_model(model)).splitlines():
                self.console.say(line)
        train_stage(
            model,
            self._student,
            self.data,
            training,
            folder,
            self.stages,
            "student.training",
            test_steps=test_steps,
        )

    def _training(self, *, scratch: bool) -> tuple[dict[str, Any], list[int]]:
        """The student's training section, and the steps after which the test split is scored."""
        section, before = self.job.student, self.job.steps_before(scratch=scratch)
        if section.total_steps is None:
            return section.training, []
        steps = [step - before for step in section.total_steps]
        return {**section.training, "max_steps": steps[-1]}, steps

    # ---- stages that leave nothing ----

    @property
    def verify(self) -> Path:
        """The folder of the module, once the student has loaded all of it."""
        self._verify(self.module)
        return self.module

    @property
    def evaluate(self) -> Path:
        """The folder of the trained student, whose adapter was loaded and scored once more."""
        folder = self.student.folder
        scores = evaluate_task(
            self._student.load_with(folder / ADAPTER),
            self._student.tokenizer,
            self.data,
            args=self.job.student.training,
        )
        self.console.say("test: " + ", ".join(f"{k} {v:.3f}" for k, v in scores.items()))
        return folder

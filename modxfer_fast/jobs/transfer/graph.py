"""The stages of a transfer, and what each depends on.

    stage        reads                                               options besides the two models
    teacher                                                          examples, training, module
    statistics   [teacher]                                           texts, spaces, pairs of layers
    maps         [statistics]                                        method, layer map, spaces
    module       teacher, [maps, statistics, head maps]              layer map, head
    refined      module, teacher, [output maps]                      texts, training
    student      refined or module, or nothing for a fresh module    examples, training

`maps`, `head maps` and `output maps` are one kind of stage. What the spaces and layers are depends
on the teacher's module, and with `layers: cka` on statistics: such a stage is described when the
earlier one is there.
"""

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from modxfer_fast import transfer
from modxfer_fast.config import ConfigError
from modxfer_fast.config.transfer import FRESH, TransferConfig, TransferSection
from modxfer_fast.jobs.stage import OutsideFolder, Stage
from modxfer_fast.jobs.task.models import Examples, TaskModel
from modxfer_fast.jobs.task.stages import teacher_stage
from modxfer_fast.jobs.transfer import builds

_SEEDED = ("shuffled", "random_matched")  # other maps depend on no seed, and so serve all of them


class TransferGraph:
    """Describes the stages of one job; runs only those that a description follows from.

    Args:
        get: the folder of a stage, which is made where it is not there.
    """

    def __init__(self, config: TransferConfig, get: Callable[[Stage], Path]) -> None:
        self.config = config
        self._get = get

    # ---- what stages are made of ----

    @property
    def section(self) -> TransferSection:
        """How the module is moved."""
        if self.config.transfer is None:
            raise ConfigError("transfer: expected a section for this stage, got null")
        return self.config.transfer

    @cached_property
    def examples(self) -> Examples:
        """The student's."""
        return Examples(self.config.task)

    @cached_property
    def texts(self) -> builds.Texts:
        """What statistics and refinement read."""
        examples = self.examples
        labelled = examples.with_fraction(self.config.teacher.train_fraction).data.texts("train")
        if self.section.texts == "train":
            return builds.Texts(labelled)
        every = examples.with_fraction(1.0).data
        seen = {tuple(text) for text in [*labelled, *examples.data.texts("train")]}
        seen |= {tuple(text) for split in ("validation", "test") for text in every.texts(split)}
        unseen = [text for text in every.texts("train") if tuple(text) not in seen]
        if not unseen:
            raise ConfigError(
                "transfer.texts: expected training examples that neither the teacher nor the "
                "student has labels of, got none"
            )
        return builds.Texts(unseen)

    @property
    def teacher_model(self) -> TaskModel:
        return self.teacher.options.model

    @cached_property
    def student_model(self) -> TaskModel:
        section, seed = self.config.student, self.config.seed
        return TaskModel.for_task(section, self.examples, seed=seed, training=section.training)

    @property
    def _both_models(self) -> dict[str, TaskModel]:
        return {"teacher": self.teacher_model, "student": self.student_model}

    @property
    def _both_bodies(self) -> dict[str, TaskModel]:
        return {role: model.without_seed for role, model in self._both_models.items()}

    @cached_property
    def module_state(self) -> transfer.PeftModuleState:
        return builds.load_module(self._get(self.teacher), self.teacher_model)

    def _layer_map(self, kind: str, **options) -> transfer.LayerMap:
        sizes = (self.student_model.architecture, self.teacher_model.architecture)
        return transfer.make_layer_map(kind, *(parts.num_layers for parts in sizes), **options)

    @cached_property
    def layer_map(self) -> transfer.LayerMap:
        """Which teacher layers a student layer takes the module of, or is as large as."""
        section = self.config.transfer
        if section is None or section.method == FRESH:
            return self._layer_map("skip")
        cka = None
        if section.layers == "cka":
            collected = self._get(self._collect(("layer_out",), "all"))
            cka = builds.load_statistics(collected).cka()
        return self._layer_map(section.layers, layers=section.sources, cka=cka)

    @cached_property
    def output_map(self) -> transfer.LayerMap:
        """Blocks whose outputs correspond: the last of every group."""
        return self._layer_map("skip_last")

    @property
    def map_options(self) -> transfer.MapOptions:
        """Of the module's maps."""
        section = self.section
        if section.preset == "reference":
            return transfer.reference_options(self.module_state.config.peft_type)
        fields: dict[str, Any] = section.model_dump(
            include={"scope", "head_aware", "scale", "write", "measured_at"}
        )
        if section.measured_at is None:
            del fields["measured_at"]
        return transfer.MapOptions(**fields)

    @property
    def _head_is_apart(self) -> bool:
        """Whether the head is mapped by another method than the module."""
        return self.section.map_of_head not in (None, self.section.method)

    @property
    def _matches_outputs(self) -> bool:
        refine = self.section.refine
        return refine is not None and refine.hidden_weight > 0

    # ---- stages ----

    @cached_property
    def teacher(self) -> Stage:
        config = self.config
        return teacher_stage(config.teacher, self.examples, config.student.training)

    @cached_property
    def statistics(self) -> Stage | None:
        """The moments of both models, None where nothing is fitted on them."""
        section = self.section
        methods = {section.method, section.map_of_head} - {FRESH, None}
        needs_data = not methods <= set(transfer.DATA_FREE_METHODS)
        if not (needs_data or self._matches_outputs):
            return None
        layer_map = self.layer_map
        spaces = list(self.map_options.sites(self.module_state.spaces))
        pairs = list(layer_map.pairs)
        if self._matches_outputs or self._head_is_apart:
            spaces.append("layer_out")
            pairs += self.output_map.pairs
        if section.head == "transport":
            spaces.append("layer_out")
            student, teacher = self.student_model.architecture, self.teacher_model.architecture
            pairs.append((student.num_layers - 1, teacher.num_layers - 1))
        return self._collect(tuple(dict.fromkeys(spaces)), tuple(sorted(set(pairs))))

    def _collect(self, spaces: tuple[str, ...], pairs: tuple[tuple[int, int], ...] | str) -> Stage:
        section = self.section.statistics
        options = builds.StatisticsOptions(
            **self._both_bodies,
            texts=self.texts,
            max_length=self.config.task.max_length,
            section=section,
            spaces=spaces,
            pairs=pairs,
        )
        inputs = {"teacher": self.teacher} if section.module_active else {}
        return Stage("statistics", builds.collect, options, inputs)

    @cached_property
    def maps(self) -> Stage | None:
        """The maps of the module's spaces, None where no module is moved."""
        section = self.section
        if section.method == FRESH:
            return None
        options = self.map_options.resolved(self.module_state)
        head = section.head == "transport" and not self._head_is_apart
        return self._fit(section.method, options, self.layer_map, self.module_state.spaces, head)

    @cached_property
    def head_maps(self) -> Stage | None:
        """The maps of the block outputs for the head, None where `maps` has them."""
        method = self.section.map_of_head
        return self._fit_outputs(method) if method and self._head_is_apart else None

    @cached_property
    def output_maps(self) -> Stage | None:
        """The maps of the block outputs that refinement compares.

        Regressions whatever the method, so that methods differ in the module that they move alone.
        """
        return self._fit_outputs("ridge") if self._matches_outputs else None

    def _fit_outputs(self, method: str) -> Stage:
        options = transfer.MapOptions().resolved(None)
        return self._fit(method, options, self.output_map, ("layer_out",), head=False)

    def _fit(
        self,
        method: str,
        options: transfer.MapOptions,
        layer_map: transfer.LayerMap,
        spaces: tuple[str, ...],
        head: bool,
    ) -> Stage:
        student, projections = self.config.student, None
        if method == "kd_projection":
            projections = OutsideFolder(Path(student.projections or student.path).expanduser())
        fitting = builds.FittingOptions(
            **self._both_bodies,
            method=method,
            layer_map=layer_map,
            spaces=spaces,
            options=options,
            head=head,
            seed=self.config.seed if method in _SEEDED else 0,
            projections=projections,
        )
        return Stage("maps", builds.fit, fitting, {"statistics": self.statistics})

    @cached_property
    def module(self) -> Stage:
        """The student's module before training, refined where the job asks for it."""
        refine = self.section.refine
        if refine is None:
            return self._unrefined
        options = builds.RefiningOptions(
            **self._both_models,
            texts=self.texts,
            max_length=self.config.task.max_length,
            section=refine,
            outputs=self.output_map if self._matches_outputs else None,
        )
        inputs = {
            "module": self._unrefined,
            "teacher": self.teacher,
            "output_maps": self.output_maps,
        }
        return Stage("refined", builds.refine, options, inputs)

    @cached_property
    def _unrefined(self) -> Stage:
        section = self.section
        sides, layer_map = self._both_models, self.layer_map
        options = builds.ModuleOptions(**sides, layer_map=layer_map, head=section.head)
        inputs = {"teacher": self.teacher, "head_maps": self.head_maps}
        if section.method == FRESH:
            return Stage("module", builds.draw, options, inputs)
        inputs |= {"maps": self.maps, "statistics": self.statistics}
        return Stage("module", builds.move, options, inputs)

    @cached_property
    def student(self) -> Stage:
        """The student trained from the moved module."""
        return self._train(scratch=False)

    @cached_property
    def scratch(self) -> Stage:
        """The student trained from a module as PEFT initialises it."""
        return self._train(scratch=True)

    def _train(self, *, scratch: bool) -> Stage:
        section, before = self.config.student, self.config.steps_before(scratch=scratch)
        training = section.training
        steps = tuple(step - before for step in section.total_steps or ())
        if steps:
            training = {**training, "max_steps": steps[-1]}
        fresh = None
        if scratch:
            layer_map = self.layer_map  # first: it sees a student that is nowhere
            fresh = transfer.fresh_config(self.module_state, self.student_model.skeleton, layer_map)
        options = builds.StudentOptions(
            model=self.student_model,
            examples=self.examples,
            training=training,
            fused_lora=section.fused_lora,
            fresh=fresh,
            test_steps=steps,
        )
        inputs = {} if scratch else {"module": self.module}
        return Stage("student", builds.train_student, options, inputs)

"""An option has one default, whether a job file, the trainer's options or a function is asked."""

import dataclasses
import inspect
import itertools

import pytest
from pydantic import BaseModel

from modxfer_fast import DistillConfig, kd_loss, linear_kd_loss, projection_loss, relation_loss
from modxfer_fast.config import LossSection, StudentSection
from modxfer_fast.config.distill import CompareSection, JobConfig
from modxfer_fast.config.loss import HiddenStatesSection, RelationsSection
from modxfer_fast.config.task_distill import (
    TaskCompareSection,
    TaskDistillConfig,
    TaskLossSection,
    TaskStudentSection,
)
from modxfer_fast.config.transfer import RefineSection, TransferSection, TransferStudentSection
from modxfer_fast.engine.tasks.distillation import TaskHiddenOptions, distil_task
from modxfer_fast.kernels.common import KDSpec
from modxfer_fast.kernels.common.spec import MADE, OF_MODELS
from modxfer_fast.losses import AttentionRelationLoss, HiddenStateLoss, LinearKDLoss
from modxfer_fast.transfer import MapOptions

DOORS = {
    "logits": (
        *(LossSection, TaskLossSection, RefineSection, DistillConfig, LinearKDLoss),
        *(kd_loss, linear_kd_loss, distil_task),
    ),
    "hidden states": (*(HiddenStatesSection, HiddenStateLoss, TaskHiddenOptions, projection_loss),),
    "relations": (RelationsSection, AttentionRelationLoss, relation_loss),
    "students": (StudentSection, TaskStudentSection, TransferStudentSection),
    "jobs": (JobConfig, TaskDistillConfig),
    "comparisons": (CompareSection, TaskCompareSection),
    "maps": (TransferSection, MapOptions),
}
# What has one name and two meanings, or depends on another option of the same door.
APART = {
    (DistillConfig, "kd_weight"): "None is 0 for encoders, else 1",
    (JobConfig, "kind"): "what tells the jobs apart",
    (projection_loss, "projection"): "a tensor",
    (projection_loss, "bias"): "a tensor",
    (TransferSection, "measured_at"): "null is what MapOptions has, written by the job",
}


def defaults(door) -> dict[str, object]:
    """Default by option; sections inside count apart."""
    if inspect.isclass(door) and issubclass(door, BaseModel):
        found = {name: field.get_default() for name, field in door.model_fields.items()}
        found = {name: found[name] for name, f in door.model_fields.items() if not f.is_required()}
    elif dataclasses.is_dataclass(door):
        own = inspect.get_annotations(door)
        missing = dataclasses.MISSING
        found = {f.name: f.default for f in dataclasses.fields(door) if f.name in own}
        found = {name: value for name, value in found.items() if value is not missing}
    else:
        found = {
            name: parameter.default
            for name, parameter in inspect.signature(door).parameters.items()
            if parameter.default is not inspect.Parameter.empty
        }
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in found.items()
        if not isinstance(value, BaseModel) and (door, name) not in APART
    }


@pytest.mark.parametrize("doors", DOORS.values(), ids=DOORS)
def test_an_option_has_one_default(doors):
    shared = 0
    for one, other in itertools.combinations(doors, 2):
        left, right = defaults(one), defaults(other)
        common = left.keys() & right.keys()
        shared += len(common)
        names = f"{one.__name__} and {other.__name__}"
        assert {n: left[n] for n in common} == {n: right[n] for n in common}, names
    assert shared  # else the doors no longer have an option in common, and nothing is tested


def test_the_trainer_resolves_to_the_same_weight(tmp_path):
    assert DistillConfig(output_dir=str(tmp_path)).kd_weight == LossSection().kd_weight


@pytest.mark.parametrize(
    "door",
    [LossSection, DistillConfig, LinearKDLoss, kd_loss, linear_kd_loss],
    ids=lambda door: door.__name__,
)
def test_every_option_of_the_objective_is_at_every_door(door):
    taken = getattr(door, "model_fields", None) or inspect.signature(door).parameters
    options = {field.name for field in dataclasses.fields(KDSpec)} - MADE
    if door not in (LinearKDLoss, linear_kd_loss):
        options -= OF_MODELS  # models are asked, or have given their logits
    assert options <= set(taken)

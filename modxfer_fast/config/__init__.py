"""Job files: YAML -> `JobConfig`, strict, with errors that name the place."""

from modxfer_fast.config.data import DataSection, SourceSection
from modxfer_fast.config.distill import CompareSection, JobConfig
from modxfer_fast.config.errors import ConfigError
from modxfer_fast.config.fields import check_fields, check_keys
from modxfer_fast.config.loading import as_dict, dump_config, load_config
from modxfer_fast.config.loss import HiddenStatesSection, LossSection, RelationsSection
from modxfer_fast.config.model import (
    FromTeacherSection,
    ModelSection,
    StudentSection,
    TokenizerSection,
)
from modxfer_fast.config.on_policy import OnPolicySection, VLLMSection
from modxfer_fast.config.server import ServerSection
from modxfer_fast.config.task import TaskSection

__all__ = [
    "CompareSection",
    "ConfigError",
    "DataSection",
    "FromTeacherSection",
    "HiddenStatesSection",
    "JobConfig",
    "LossSection",
    "ModelSection",
    "OnPolicySection",
    "RelationsSection",
    "ServerSection",
    "SourceSection",
    "StudentSection",
    "TaskSection",
    "TokenizerSection",
    "VLLMSection",
    "as_dict",
    "check_fields",
    "check_keys",
    "dump_config",
    "load_config",
]

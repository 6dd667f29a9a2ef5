"""The student of one seed: as it starts, and as a run leaves it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from modxfer_fast.config import StudentSection
from modxfer_fast.jobs.distill.models import ModelSource
from modxfer_fast.models import apply_peft, load_adapter, load_model, patch_peft_model


@dataclass(frozen=True)
class Student:
    """What every run of a seed starts from.

    Attributes:
        kind: "causal_lm" or "encoder".
        source: of the weights.
        base: where an adapter finds its base in the output, if that was made here. Absolute,
            because PEFT takes another path as relative to the current folder.
    """

    section: StudentSection
    kind: str
    seed: int
    source: ModelSource
    base: Path | None

    @property
    def identity(self) -> list[Any]:
        section = self.section
        loaded = section.revision, section.dtype, section.attn_implementation
        return [self.kind, self.seed, self.source, *loaded, section.peft, section.fuses_lora]

    def load(
        self, *, fuse_lora: bool = True, tell: Callable[[str], None] | None = None
    ) -> PreTrainedModel:
        """The start weights with fresh adapters.

        Args:
            fuse_lora: False for PEFT's own layers also where the section fuses them.
            tell: is given a line for each kind of layer that is fused or is not.
        """
        model = load_model(self.source.path, self.section, self.kind)
        if self.section.peft is not None:
            model = apply_peft(model, self.section.peft, "student.peft", seed=self.seed)
            if self.base is not None:
                model.peft_config[model.active_adapter].base_model_name_or_path = str(self.base)
        if self.section.fuses_lora and fuse_lora:
            report = patch_peft_model(model)
            if tell is not None:
                for line in str(report).splitlines():
                    tell(line)
        return model

    def load_trained(self, folder: Path) -> PreTrainedModel:
        """What a run saved, as anyone would load it."""
        if self.section.peft is None:
            return load_model(str(folder), self.section, self.kind)
        return load_adapter(load_model(self.source.path, self.section, self.kind), folder)

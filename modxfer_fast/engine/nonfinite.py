"""Which tensor of a step was the first that is not finite; and the step kept, to run it again.

Steps run without any of this. One that was skipped is run once more, forward, with hooks on every
module of student and teacher, and kept with its batches, weights and random state for
`modxfer replay`, which runs it backward too.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_leaves_with_path, tree_map

from modxfer_fast.engine.module import DistillModule
from modxfer_fast.engine.teachers.several import models_of as models_of_teacher
from modxfer_fast.models.architecture import without_peft

FOLDER, STUDENT = "nonfinite", "student"
_MOST = 8  # findings of a micro-batch


@dataclass(frozen=True)
class Finding:
    """A tensor that is not finite, in the order in which such tensors came to be.

    Attributes:
        tensor: model, module, and which tensor of it: "student.model.norm output".
        broken, numel: elements that are NaN or infinite, and all; padding left out.
        largest: magnitude of the finite ones.
        micro_batch: of the step, from 0.
    """

    tensor: str
    broken: int
    numel: int
    largest: float
    micro_batch: int = 0

    def __str__(self) -> str:
        return f"{self.tensor} ({self.broken} of {self.numel})"


class Watch:
    """Notes tensors that are not finite while models run.

    Args:
        models: by the names that findings begin with.
        backward: whether gradients of outputs are looked at too.
    """

    def __init__(self, models: Mapping[str, nn.Module], *, backward: bool = False):
        self.findings: list[Finding] = []
        self.micro_batch = 0
        self._models, self._backward = models, backward
        self._mask: Tensor | None = None  # tokens that are no padding

    def begin(self, micro_batch: int, batch: Mapping[str, Any]) -> None:
        """A micro-batch comes, which is looked at itself."""
        self.micro_batch, self._mask = micro_batch, None
        for path, leaf in tree_leaves_with_path(dict(batch)):
            keys = ".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path)
            self.note(f"batch.{keys}", leaf)
        mask = batch.get("attention_mask")
        self._mask = None if mask is None or mask.dim() != 2 else mask.bool()

    @torch.no_grad()
    def note(self, name: str, value: Any) -> None:
        """Keeps the name of a tensor, or of the tensors in a structure, with what is not finite."""
        if sum(each.micro_batch == self.micro_batch for each in self.findings) >= _MOST:
            return
        for leaf in tree_leaves(value):
            if not (isinstance(leaf, Tensor) and leaf.is_floating_point()):
                continue
            counted = leaf.detach()
            if self._mask is not None and counted.shape[:2] == self._mask.shape:
                counted = counted[self._mask]
            finite = counted.isfinite()
            if finite.all():
                continue
            kept = counted[finite].abs()
            self.findings.append(
                Finding(
                    name,
                    int((~finite).sum()),
                    counted.numel(),
                    float(kept.max()) if kept.numel() else 0.0,
                    self.micro_batch,
                )
            )
            return

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """A block in which what the models read and return is looked at."""
        hooks = []
        for role, model in self._models.items():
            for path, module in model.named_modules():
                name = f"{role}.{path}" if path else role
                hooks += [
                    module.register_forward_pre_hook(
                        lambda _, args, kwargs, n=name: self.note(f"{n} input", (args, kwargs)),
                        with_kwargs=True,
                    ),
                    module.register_forward_hook(
                        lambda _, args, output, name=name: self._see_output(name, output)
                    ),
                ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _see_output(self, name: str, output: Any) -> None:
        self.note(f"{name} output", output)
        if not self._backward:
            return
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                leaf.register_hook(lambda grad, name=name: self.note(f"{name} output's grad", grad))


def random_state() -> dict[str, Tensor]:
    """Of the generators that models draw from."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@dataclass
class KeptStep:
    """A step of one rank.

    Attributes:
        step: from 1, as logs count.
        batches: its micro-batches, as the module gets them; on the CPU once written.
        counts: num_<name>_in_batch of the whole step.
        random: states of the generators before the first micro-batch.
    """

    step: int
    rank: int
    world_size: int
    batches: list[dict[str, Any]]
    counts: dict[str, Any]
    random: dict[str, Tensor]

    def write(self, folder: Path, findings: list[Finding]) -> None:
        """Writes the step as `rank-<rank>.pt` of a folder."""
        kept = tree_map(lambda x: x.detach().cpu() if isinstance(x, Tensor) else x, vars(self))
        kept["findings"] = [asdict(finding) for finding in findings]
        torch.save(kept, folder / f"rank-{self.rank}.pt")

    @classmethod
    def read(cls, file: Path) -> tuple["KeptStep", list[Finding]]:
        """The step in a file, which this package wrote, and what was found when it was skipped."""
        kept = torch.load(file, weights_only=False, map_location="cpu")
        findings = [Finding(**each) for each in kept.pop("findings")]
        return cls(**kept), findings

    def to(self, device: torch.device) -> "KeptStep":
        batches, counts = tree_map(
            lambda x: x.to(device) if isinstance(x, Tensor) else x, (self.batches, self.counts)
        )
        return replace(self, batches=batches, counts=counts)

    def run(self, watch: Watch, run: Any) -> None:
        """Runs every micro-batch through `run(batch)`, from the random state that it had."""
        now = random_state()
        set_random_state(self.random)
        try:
            with watch.watching():
                for index, batch in enumerate(self.batches):
                    watch.begin(index, batch)
                    output = run({**batch, **self.counts})
                    watch.note("loss", output["loss"])
        finally:
            set_random_state(now)


def explain(
    kept: KeptStep,
    module: DistillModule,
    wrapped: nn.Module,
    folder: Path,
    save_student: Callable[[Path], None],
) -> str:
    """Runs a skipped step once more, forward, and keeps it in `folder`. Collective.

    Args:
        wrapped: what training calls, around `module`.
        save_student: writes the weights that the step began with, which a skipped one leaves.

    Returns:
        The first tensors that were not finite and where the step is, to follow a sentence.
    """
    watch = Watch(models_of(module))
    meter, module.meter = module.meter, module.new_meter()
    try:
        with torch.no_grad():
            kept.run(watch, lambda batch: wrapped(**batch))
    finally:
        module.meter = meter
    found = [(kept.rank, str(watch.findings[0]))] if watch.findings else []
    first = [f"rank {rank}: {finding}" for rank, finding in gather_object(found)]
    what = "; ".join(first[:4]) or "every output is finite, the gradients are not"
    refused: Exception | None = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        kept.write(folder, watch.findings)
    except (OSError, RuntimeError) as error:  # a full disk is no reason to stop training
        refused = error
    try:
        save_student(folder / STUDENT)
    except (OSError, RuntimeError, SafetensorError) as error:
        refused = error
    if any(gather_object([refused is not None])):
        return f"; first not finite: {what}; the step could not be kept ({refused})"
    return f"; first not finite: {what}; modxfer replay {folder} runs it again"


def models_of(module: DistillModule) -> dict[str, nn.Module]:
    """The models whose tensors can be named, by the names that findings begin with."""
    models: dict[str, nn.Module] = {"student": without_peft(module.student)}
    of_teacher = models_of_teacher(module.teacher).items()
    return models | {role: without_peft(model) for role, model in of_teacher}

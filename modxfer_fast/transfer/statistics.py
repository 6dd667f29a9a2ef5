"""Moments of the features of two models on the rows that they share, in one pass over the texts.

What a map between the models can be fitted from: means, variances, covariances inside each side and
between the sides, per space and pair of layers. Rows themselves are never kept.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modxfer_fast._version import __version__
from modxfer_fast.models import Architecture
from modxfer_fast.models.architecture import SPACES, without_peft
from modxfer_fast.transfer.artefact import read_artefact, write_artefact
from modxfer_fast.transfer.errors import TransferError
from modxfer_fast.transfer.features import FeatureTaps, Site, observed
from modxfer_fast.transfer.fingerprint import model_fingerprint, module_fingerprint
from modxfer_fast.transfer.moments import Moments, StreamingMoments
from modxfer_fast.transfer.pairing import PairCounts, PairedBatch, Pooling

KIND = "statistics"
LayerPair = tuple[int, int]


class Statistics:
    """Moments per space, student layer and teacher layer.

    Attributes:
        facts: how they were made; `collect_statistics` lists them.
    """

    def __init__(self, fit: StreamingMoments, held_out: StreamingMoments, facts: dict[str, Any]):
        self.facts = facts
        self.spaces: tuple[str, ...] = tuple(facts["spaces"])
        self.layer_pairs: tuple[LayerPair, ...] = tuple((s, t) for s, t in facts["layer_pairs"])
        self._fit, self._held_out = fit, held_out
        self._student_sites, self._teacher_sites = _sites(self.spaces, self.layer_pairs)

    def moments(self, space: str, s: int, t: int, *, held_out: bool = False) -> Moments:
        """Moments of student layer `s` (x) and teacher layer `t` (y) in `space`.

        Args:
            held_out: of the batches that the others do not contain.

        Raises:
            TransferError: not among the spaces and layer pairs collected; or no batch was held out.
        """
        if space not in self.spaces or (s, t) not in self.layer_pairs:
            pairs = ", ".join(f"{a}-{b}" for a, b in self.layer_pairs)
            raise TransferError(
                f"statistics: expected a space of {', '.join(self.spaces)} and student-teacher "
                f"layers of {pairs}; got {space} {s}-{t}"
            )
        if held_out and not self.facts["held_out_tokens"]:
            raise TransferError(
                f"statistics: no token is held out ({self.facts['batches']} batches, "
                f"held_out_every {self.facts['held_out_every']}); use more batches or smaller ones"
            )
        a, b = self._student_sites[Site(space, s)], self._teacher_sites[Site(space, t)]
        return (self._held_out if held_out else self._fit).moments(a, b)

    def cka(self, space: str = "layer_out") -> Tensor:
        """Linear CKA of every pair of layers, [L_s, L_t] fp64; NaN where it was not collected."""
        layers = self.facts["student"]["num_layers"], self.facts["teacher"]["num_layers"]
        table = torch.full(layers, float("nan"), dtype=torch.float64)
        for s, t in self.layer_pairs:
            table[s, t] = linear_cka(self.moments(space, s, t))
        return table

    def save(self, folder: str | Path, *, checksums: bool = True) -> None:
        """Write an artefact folder; see `artefact.write_artefact`."""
        tensors = {
            f"{part}.{name}": tensor
            for part, moments in (("fit", self._fit), ("held_out", self._held_out))
            for name, tensor in moments.state_dict().items()
        }
        write_artefact(folder, KIND, tensors, self.facts, checksums=checksums)

    @classmethod
    def load(cls, folder: str | Path, *, checksums: bool = True) -> "Statistics":
        """Read what `save` wrote.

        Raises:
            TransferError: a missing or corrupt file.
        """
        tensors, facts = read_artefact(folder, KIND, checksums=checksums)
        states: dict[str, dict[str, Tensor]] = {"fit": {}, "held_out": {}}
        for name, tensor in tensors.items():
            part, _, entry = name.partition(".")
            states[part][entry] = tensor
        fit, held_out = map(StreamingMoments.from_state_dict, states.values())
        return cls(fit, held_out, facts)


def collect_statistics(
    teacher: nn.Module,
    student: nn.Module,
    batches: Sequence[PairedBatch],
    *,
    layer_pairs: Sequence[LayerPair] | str,
    spaces: Sequence[str],
    held_out_every: int = 5,
    module_active: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Statistics:
    """Run both models over the batches and accumulate the moments of their features.

    Args:
        teacher, student: transformers models, with or without PEFT around them, each on its device;
            the moments are kept on the student's. Their modes and flags stay as they are.
        batches: of `Pairing.batches`, or any sequence.
        layer_pairs: (student layer, teacher layer), or "all".
        spaces: of modxfer_fast.models.architecture.SPACES.
        held_out_every: of so many batches the last goes to the held-out moments instead; 0 for
            none, which is what the reference does.
        module_active: take the teacher's features with its PEFT module switched on. The student's
            are always those of the bare model.
        progress: called with (batches done, batches in all).

    Returns:
        Statistics with facts: tokens, held_out_tokens (rows of the moments), examples, batches,
        student_tokens, kept_tokens, kept_fraction (`PairCounts`), pairing and tokenizer digests,
        spaces, layer_pairs, held_out_every, module_active; `teacher` and `student` (name, revision,
        sizes, fingerprint); `widths` per space: student, teacher, too_few_tokens (not more tokens
        than features), constant_student, constant_teacher (features without variance, over all
        layers); versions.

    Raises:
        TransferError: spaces or layers that a model does not have (those it has are listed), no
            row in common, or features that are not finite (model, layer and space are named).
    """
    if module_active and module_fingerprint(teacher) is None:
        raise TransferError("module_active: expected a teacher with a PEFT module, got none")
    if module_active and without_peft(teacher) is without_peft(student):
        raise TransferError("module_active: expected two models, got one that is both")
    if held_out_every < 0 or held_out_every == 1:
        raise TransferError(f"held_out_every: expected 0 or at least 2, got {held_out_every}")
    pairs = _layer_pairs(layer_pairs, teacher, student)
    spaces = tuple(dict.fromkeys(spaces))
    if not spaces:
        raise TransferError("spaces: expected at least one, got none")
    student_sites, teacher_sites = _sites(spaces, pairs)
    taps_t = FeatureTaps(teacher, teacher_sites, "teacher")
    taps_s = FeatureTaps(student, student_sites, "student")
    sites = [
        (student_sites[Site(space, s)], teacher_sites[Site(space, t)])
        for space in spaces
        for s, t in pairs
    ]
    streams = [
        StreamingMoments(taps_s.widths, taps_t.widths, sites, device=taps_s.device)
        for _ in ("fit", "held_out")
    ]

    counts, tokens = PairCounts(), [0, 0]
    with observed(teacher, module_active=module_active), observed(student):
        for i, batch in enumerate(batches):
            counts = counts.plus(batch.counts)
            if batch.counts.rows:
                ys = _rows(taps_t, batch.teacher_inputs, batch.teacher_pool)
                xs = _rows(taps_s, batch.student_inputs, batch.student_pool)
                is_held_out = held_out_every > 0 and (i + 1) % held_out_every == 0
                streams[is_held_out].update(xs, [y.to(taps_s.device) for y in ys], None)
                tokens[is_held_out] += batch.counts.rows
            if progress is not None:
                progress(i + 1, len(batches))
    if not tokens[0]:
        raise TransferError(
            f"batches: expected rows that both models share, got none from {counts.examples} "
            f"examples ({counts.student_tokens} tokens of the student)"
        )

    facts = {
        "tokens": tokens[0],
        "held_out_tokens": tokens[1],
        "batches": len(batches),
        "held_out_every": held_out_every,
        "examples": counts.examples,
        "student_tokens": counts.student_tokens,
        "kept_tokens": counts.kept_tokens,
        "kept_fraction": counts.kept_fraction,
        **getattr(batches, "facts", {}),
        "spaces": list(spaces),
        "layer_pairs": [list(pair) for pair in pairs],
        "module_active": module_active,
        "teacher": _model_facts(teacher, with_module=module_active),
        "student": _model_facts(student, with_module=False),
        "versions": {
            "modxfer_fast": __version__,
            **{name: metadata.version(name) for name in ("torch", "transformers", "peft")},
        },
    }
    fit, held_out = streams
    statistics = Statistics(fit, held_out, facts)
    facts["widths"] = {space: _width_facts(statistics, space) for space in spaces}
    return statistics


def linear_cka(moments: Moments) -> float:
    """Linear CKA of two sets of features, ||C_xy||^2 / (||C_xx|| ||C_yy||), Frobenius norms.

    Kornblith et al. 2019, equation 6. 0 where one side does not vary.
    """
    norm = torch.linalg.matrix_norm
    scale = norm(moments.cov_xx) * norm(moments.cov_yy)
    return float(norm(moments.cov_xy) ** 2 / scale) if scale > 0 else 0.0


def _sites(spaces: Sequence[str], pairs: Sequence[LayerPair]) -> tuple[dict[Site, int], ...]:
    """Sites of the student and of the teacher, each with its place among the accumulators."""
    sides = (sorted(set(layers)) for layers in zip(*pairs, strict=True))
    return tuple(
        {Site(*site): i for i, site in enumerate(itertools.product(spaces, side))} for side in sides
    )


def _layer_pairs(
    layer_pairs: Sequence[LayerPair] | str, teacher: nn.Module, student: nn.Module
) -> tuple[LayerPair, ...]:
    if isinstance(layer_pairs, str):
        if layer_pairs != "all":
            raise TransferError(f'layer_pairs: expected pairs or "all", got {layer_pairs!r}')
        layers_s, layers_t = (
            range(Architecture.of(each).num_layers) for each in (student, teacher)
        )
        return tuple(itertools.product(layers_s, layers_t))
    pairs = tuple(dict.fromkeys((int(s), int(t)) for s, t in layer_pairs))
    if not pairs:
        raise TransferError("layer_pairs: expected at least one, got none")
    return pairs


def _rows(taps: FeatureTaps, inputs: Mapping[str, Tensor], pool: Pooling) -> list[Tensor]:
    """Rows [n, width] of each site."""
    on_device = {name: value.to(taps.device) for name, value in inputs.items()}
    rows = taps.run(on_device, pool.to(taps.device))
    # one synchronisation a batch: NaN and infinity survive a sum
    finite = torch.stack([features.sum(dtype=torch.float64) for features in rows]).isfinite()
    if not finite.all():
        bad = [site for site, is_finite in zip(taps.sites, finite, strict=True) if not is_finite]
        first = min(bad, key=lambda site: (site.layer, SPACES.index(site.space)))
        raise TransferError(
            f"{taps.role}: expected finite features, got NaN or infinity in {first.space} of layer "
            f"{first.layer}"
        )
    return rows


def _model_facts(model: nn.Module, *, with_module: bool) -> dict[str, Any]:
    config, architecture = without_peft(model).config, Architecture.of(model)
    return {
        "name": config.name_or_path or config.model_type,
        "revision": getattr(config, "_commit_hash", None),
        "family": architecture.family,
        "num_layers": architecture.num_layers,
        "hidden_size": architecture.hidden_size,
        "fingerprint": model_fingerprint(model),
        "module": module_fingerprint(model) if with_module else None,
    }


def _width_facts(statistics: Statistics, space: str) -> dict[str, Any]:
    # any pair of a layer has its variance
    with_student = {s: (s, t) for s, t in statistics.layer_pairs}.values()
    with_teacher = {t: (s, t) for s, t in statistics.layer_pairs}.values()
    var_s = [statistics.moments(space, *pair).var_x for pair in with_student]
    var_t = [statistics.moments(space, *pair).var_y for pair in with_teacher]
    width_s, width_t = len(var_s[0]), len(var_t[0])
    return {
        "student": width_s,
        "teacher": width_t,
        "too_few_tokens": statistics.facts["tokens"] <= max(width_s, width_t),
        "constant_student": sum(int((var == 0).sum()) for var in var_s),
        "constant_teacher": sum(int((var == 0).sum()) for var in var_t),
    }

"""Fits the maps of every space and pair of layers with one method.

method           read and write
lsa              assignment that maximises the Pearson correlation (the paper)
lsa_abs          assignment that maximises its magnitude, signs and scales carried
procrustes       rotation
ridge            a regression to read, a rotation to write, or a second regression
reduced_rank     those of ridge; transport then truncates the update on the student's own features
kd_projection    projections trained by our distillation
identity, truncate, stride    no data
shuffled         lsa, with the student's features in random order
random_matched   truncate; transport then redraws every tensor from its own mean and deviation
"""

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from functools import reduce
from pathlib import Path
from threading import Lock
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from modxfer_fast.config.transfer_names import MAP_METHODS, SCALES, SCOPES, WRITES
from modxfer_fast.models.architecture import RESIDUAL_SPACES, ROLES, SPACES, Architecture
from modxfer_fast.transfer.errors import TransferError, check_choice
from modxfer_fast.transfer.layer_maps import LayerMap
from modxfer_fast.transfer.maps import heads
from modxfer_fast.transfer.maps.controls import CONTROLS
from modxfer_fast.transfer.maps.kd_projection import ProjectionMaps
from modxfer_fast.transfer.maps.lsa import fit_lsa
from modxfer_fast.transfer.maps.procrustes import fit_procrustes
from modxfer_fast.transfer.maps.ridge import GRID, fit_ridge
from modxfer_fast.transfer.maps.scores import scores
from modxfer_fast.transfer.maps.space_map import Fitted, Key, Maps, SpaceMap
from modxfer_fast.transfer.modules import PeftModuleState
from modxfer_fast.transfer.moments import Moments
from modxfer_fast.transfer.statistics import Statistics

# What a LoRA writes into the gate or the up projection lies anywhere in the space of the hidden
# neurons, but the outputs of these linears span no more than they read. Behind the non-linearity
# the same neurons vary freely, and both linears get one map of them.
MEASURED_AT: Mapping[str, str] = MappingProxyType({"ffn_gate": "ffn_inner", "ffn_up": "ffn_inner"})
# kd_projection regresses in the spaces that no projection reaches
_REGRESSIONS = ("ridge", "reduced_rank", "kd_projection")
_FITS_MEANS = ("procrustes", *_REGRESSIONS)
_DEFAULT_SCALE = {"lsa": "none", "shuffled": "none", "procrustes": "global"}  # others: "feature"
DATA_FREE_METHODS = (*CONTROLS, "random_matched")


@dataclass(frozen=True)
class MapOptions:
    """Choices that a method leaves open.

    Attributes:
        scope: "layer": each pair of layers its own maps; "global": one map for the whole residual
            stream, from the moments of its spaces summed over all pairs.
        head_aware: pair heads before features in query, key, value and context; None: yes, except
            for regressions, which may draw on every head; these do it where a linear writes more
            features than it reads, because only inside a head features then span their space.
        scale: how deviations are carried: "none", "global" (one ratio a space) or "feature";
            None: "none" for lsa, "feature" for lsa_abs, "global" for procrustes.
        means: carry means, which transport folds into biases. Without, rotations and what
            regressions read are fitted about 0 instead of the means: right for a LoRA and IA3,
            which have no bias. None: as the module that maps are fitted for can take them; yes
            where only its spaces are known.
        write: of regressions, how changes are mapped: "rotation", or "regression" of the student's
            features on the teacher's. A module writes in directions that features without it hardly
            have; there a regression is free to be large, and is, where a rotation keeps lengths.
        ridge: the penalties to choose from.
        measured_at: space -> the space whose map it uses instead of its own; {} for none. By
            default the gate and up projections use that of the neurons behind them. Projections of
            `kd_projection` need no such place, and take it where statistics have it.
    """

    scope: str = "layer"
    head_aware: bool | None = None
    scale: str | None = None
    means: bool | None = None
    write: str = "rotation"
    ridge: tuple[float, ...] = GRID
    measured_at: Mapping[str, str] = field(default_factory=lambda: dict(MEASURED_AT))

    def __post_init__(self):
        check_choice("scope", self.scope, SCOPES)
        if self.scale is not None:
            check_choice("scale", self.scale, SCALES)
        check_choice("write", self.write, WRITES)
        if not self.ridge or min(self.ridge) <= 0:
            raise TransferError(f"ridge: expected penalties above 0, got {self.ridge}")
        for space in (*self.measured_at, *self.measured_at.values()):
            if space not in SPACES:
                raise TransferError(
                    f"measured_at: expected spaces among {', '.join(SPACES)}, got {space!r}"
                )

    def resolved(self, module: PeftModuleState | None) -> "MapOptions":
        """The same with `means` decided for this module."""
        if self.means is not None:
            return self
        return replace(self, means=module is None or module.takes_means)

    def sites(self, spaces: Sequence[str]) -> tuple[str, ...]:
        """The spaces that statistics are needed of, to fit maps for these."""
        return tuple(dict.fromkeys(self.measured_at.get(space, space) for space in spaces))


def reference_options(peft_type: str) -> MapOptions:
    """The paper's choices, for the method "lsa": one Z for all tensors of a layer, nothing else.

    Args:
        peft_type: "LORA": Z from the input of the query projection, for inputs and outputs of
            query, key and value; "BOTTLENECK": Z from the output of the FFN.
    """
    measured = {
        "LORA": dict.fromkeys(("query", "key", "value"), "attention_in"),
        "BOTTLENECK": dict.fromkeys(("layer_out", "ffn_out"), "ffn_out"),
    }
    if peft_type not in measured:
        raise TransferError(
            f"peft_type: the paper moves {' and '.join(measured)}, got {peft_type!r}"
        )
    return MapOptions(head_aware=False, scale="none", means=False, measured_at=measured[peft_type])


def fit_maps(
    statistics: Statistics | None,
    layer_map: LayerMap,
    method: str,
    *,
    teacher: Architecture | nn.Module,
    student: Architecture | nn.Module,
    module: PeftModuleState | None = None,
    spaces: Sequence[str] | None = None,
    options: MapOptions | None = None,
    head: bool = False,
    projections: str | Path | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Maps:
    """The maps of every space for every pair of layers of a layer map.

    Fewer tokens than features, constant features and rank-deficient moments are all allowed: what
    the data does not determine is mapped to zero (rotations, regressions) or to a partner without
    correlation (assignments). Fit scores are of held-out tokens if there are any.

    Args:
        statistics: of these models, with these spaces and pairs; None for identity, truncate,
            stride, random_matched, and for kd_projection.
        teacher, student: architectures; kd_projection needs the models.
        module: the one to be moved, which has the spaces and says whether means are carried.
        spaces: in place of a module.
        head: also map the output of the last layers, means included, for a head that is moved.
        projections: folder of kd_projection, that of the distilled student.
        seed: of "shuffled".
        progress: called with (maps done, maps in all).

    Raises:
        TransferError: unknown method or space, a module and spaces or neither, moments that are
            missing or not finite, widths the method cannot map.
    """
    if (module is None) == (spaces is None):
        both = "none" if module is None else "both"
        raise TransferError(f"module, spaces: expected exactly one of them, got {both}")
    spaces = module.spaces if module is not None else tuple(spaces or ())
    options = (options or MapOptions()).resolved(module)
    teacher_parts, student_parts = (
        model if isinstance(model, Architecture) else Architecture.of(model)
        for model in (teacher, student)
    )
    _check(method, statistics, layer_map, teacher_parts, student_parts, spaces)
    keys = [(space, s, t) for space in dict.fromkeys(spaces) for s, t in layer_map.pairs]
    last = ("layer_out", student_parts.num_layers - 1, teacher_parts.num_layers - 1)
    fitter = _Fitter(statistics, method, teacher_parts, student_parts, options, seed)
    if method == "kd_projection":
        fitter.projection_maps = _projection_maps(
            projections, teacher, student, fitter.moments_if_collected
        )
    if options.scope == "global":
        # behind a norm of its own, an output is in the units of the residual stream no more
        apart = {*teacher_parts.norms_behind, *student_parts.norms_behind}
        fitter.pool([key for key in keys if key[0] in RESIDUAL_SPACES and key[0] not in apart])
    fitters = dict.fromkeys(keys, fitter)
    if head and last not in fitters:
        keys.append(last)
        # a head has a bias, whatever the module has
        fitters[last] = replace(fitter, options=replace(options, means=True))
    maps = {}
    # the assignment and the decompositions release the interpreter's lock
    with ThreadPoolExecutor(max_workers=min(os.cpu_count() or 1, len(keys))) as workers:
        fits = workers.map(lambda key: fitters[key].fit(key), keys)
        for key, fitted in zip(keys, fits, strict=True):
            maps[key] = fitted
            if progress is not None:
                progress(len(maps), len(keys))
    return Maps(
        maps,
        method,
        options=asdict(options),
        facts={
            "layer_map": layer_map.facts(),
            "seed": seed,
            "statistics": dict(statistics.facts) if statistics is not None else None,
        },
    )


def _check(method, statistics, layer_map, teacher, student, spaces) -> None:
    check_choice("method", method, MAP_METHODS)
    if not spaces:
        raise TransferError("spaces: expected at least one, got none")
    both = [space for space in teacher.spaces if space in student.spaces]
    for space in spaces:
        if space not in both:
            raise TransferError(
                f"spaces: expected among those that both models have, {', '.join(both)}; "
                f"got {space!r}"
            )
    layer_map.check_fits(student, teacher)
    if statistics is None and method not in (*DATA_FREE_METHODS, "kd_projection"):
        raise TransferError(f"statistics: expected for the method {method!r}, got none")


def _projection_maps(folder, teacher, student, moments) -> ProjectionMaps:
    if folder is None:
        raise TransferError(
            "projections: expected the folder of the distilled student for the method "
            "'kd_projection', got none"
        )
    if isinstance(teacher, Architecture) or isinstance(student, Architecture):
        raise TransferError(
            "teacher, student: expected models for the method 'kd_projection', whose linears carry "
            "the projections into a block; got architectures"
        )
    return ProjectionMaps(folder, teacher, student, moments)


@dataclass
class _Fitter:
    """Fits the map of any key; several threads may ask at once."""

    statistics: Statistics | None
    method: str
    teacher: Architecture
    student: Architecture
    options: MapOptions
    seed: int
    projection_maps: ProjectionMaps | None = None

    def __post_init__(self):
        self.scale = self.options.scale or _DEFAULT_SCALE.get(self.method, "feature")
        there = self.statistics
        self._holds_out = there is not None and there.facts["held_out_tokens"] >= 2
        self._global: Fitted | None = None
        self._units: dict[Key, tuple[float, float]] = {}
        self._pairs: dict[tuple[int, int], dict[str, heads.Pairs]] = {}
        # statistics put the last rows and triangles in place when they are first asked for
        self._lock = Lock()

    def moments(self, space: str, s: int, t: int) -> Moments:
        """Moments of a pair on the host, all finite."""
        moments = self._collected(space, s, t)
        numbers = [x for x in vars(moments).values() if isinstance(x, Tensor)]
        if not all(x.isfinite().all() for x in numbers):
            raise TransferError(
                f"statistics: NaN or infinity in the space {space!r} of student layer {s} and "
                f"teacher layer {t}"
            )
        return moments

    def held_out(self, space: str, s: int, t: int) -> Moments | None:
        """Moments of the held-out tokens, None where they are too few."""
        return self._collected(space, s, t, held_out=True) if self._holds_out else None

    def _collected(self, space: str, s: int, t: int, *, held_out: bool = False) -> Moments:
        if self.statistics is None:
            raise TransferError(
                f"statistics: expected for the space {space!r} with the method {self.method!r}, "
                "got none"
            )
        with self._lock:
            return self.statistics.moments(space, s, t, held_out=held_out).on_cpu()

    def moments_if_collected(self, space: str, s: int, t: int) -> Moments | None:
        """None where statistics lack this space or pair, or there are none."""
        there = self.statistics
        if there is None or space not in there.spaces or (s, t) not in there.layer_pairs:
            return None
        return self.moments(space, s, t)

    def pool(self, keys: list[Key]) -> None:
        """From now on one map, fitted to the moments of all these keys together, serves them."""
        if not keys or self.method in (*DATA_FREE_METHODS, "kd_projection"):
            return
        for key in keys:
            moments = self._about(self.moments(self._site(key[0]), *key[1:]))
            self._units[key] = _deviation(moments.var_x), _deviation(moments.var_y)
        self._global = self._fit_together(keys, self._about)
        if self.method in _REGRESSIONS and not self.options.means:
            # pooled moments have no means left to choose by: what writes is fitted apart
            _, write, numbers = self._fit_together(keys, lambda moments: moments)
            read, _, others = self._global
            self._global = read, write, {**numbers, **others}

    def _fit_together(self, keys: list[Key], view: Callable[[Moments], Moments]) -> Fitted:
        def together(*, held_out: bool) -> Moments:
            """Within-pair moments of all pairs, each pair counted alike; means are 0."""
            several = (
                view(self._collected(self._site(space), s, t, held_out=held_out)).in_units(
                    *self._units[space, s, t]
                )
                for space, s, t in keys
            )
            total = reduce(_sum, (pair.about(pair.mean_x, pair.mean_y) for pair in several))
            return total.in_units(len(keys) ** 0.5, len(keys) ** 0.5)

        held_out = together(held_out=True) if self._holds_out else None
        return self._dense(together(held_out=False), held_out, "layer_out", 0, 0)

    def fit(self, key: Key) -> SpaceMap:
        """The map of one space and pair."""
        space, s, t = key
        site = self._site(space)
        numbers: dict[str, float] = {}
        if self.method in DATA_FREE_METHODS:
            moments = self.moments_if_collected(site, s, t)
            read, write = self._data_free(site)
            mean_s, mean_t = read.new_zeros(read.shape[0]), read.new_zeros(read.shape[1])
        elif (projections := self._projections(site)) is not None:
            moments = self.moments_if_collected(site, s, t)
            read, write, mean_s, mean_t = projections.fit(site, s, t)
        else:
            moments = self.moments(site, s, t)
            mean_s, mean_t = moments.mean_x, moments.mean_y
            if key in self._units:
                read, write, numbers = self._pooled_map(key)
            else:
                read, write, numbers = self._dense(moments, self.held_out(site, s, t), site, s, t)
        if not self.options.means:
            mean_s, mean_t = torch.zeros_like(mean_s), torch.zeros_like(mean_t)
        expected = (self.student.width(space), self.teacher.width(space))
        if tuple(read.shape) != expected:
            raise TransferError(
                f"maps: expected {list(expected)} for the space {space!r} of student layer {s} and "
                f"teacher layer {t}, got {list(read.shape)} measured at {site!r}"
            )
        fit = {}
        if moments is not None:
            fit = scores(read, write, self.held_out(site, s, t) or moments)
        return SpaceMap(read, write, mean_s, mean_t, {**fit, **numbers})

    def _site(self, space: str) -> str:
        site = self.options.measured_at.get(space, space)
        if self.method == "kd_projection" and not self._is_collected(site):
            return space
        return site

    def _is_collected(self, site: str) -> bool:
        return self.statistics is not None and site in self.statistics.spaces

    def _projections(self, site: str) -> ProjectionMaps | None:
        """Those of a distillation where they give the map, and all of it."""
        if self.projection_maps is None or not self.projection_maps.covers(site):
            return None
        apart = {*self.teacher.norms_behind, *self.student.norms_behind}
        measured = site in apart or self._is_wide(site)
        return None if measured and self._is_collected(site) else self.projection_maps

    def _pooled_map(self, key: Key) -> Fitted:
        assert self._global is not None  # keys have units once it is there
        read, write, numbers = self._global
        if self.scale == "none" and self.method not in _REGRESSIONS:
            return read, write, numbers
        unit_s, unit_t = self._units[key]
        return read * (unit_t / unit_s), write * (unit_s / unit_t), numbers

    def _dense(self, moments: Moments, held: Moments | None, site: str, s: int, t: int) -> Fitted:
        heads_s, heads_t = self.student.heads(site), self.teacher.heads(site)
        aware = self.options.head_aware
        if aware is None:
            aware = self.method not in _REGRESSIONS or self._is_wide(site)
        if heads_s is not None and heads_t is not None and aware:
            pairs = self._head_pairs(s, t)[site]
            fitted = heads.fit_by_heads(self._on_moments, moments, held, heads_s, heads_t, pairs)
        else:
            fitted = self._on_moments(moments, held, self._span(site))
        if self.method != "shuffled":
            return fitted
        read, write, numbers = fitted
        order = torch.randperm(read.shape[0], generator=self._generator(site, s, t))
        return read[order], write[:, order], numbers

    def _head_pairs(self, s: int, t: int) -> dict[str, heads.Pairs]:
        """The same for all spaces that heads share, whichever of them maps are fitted for."""
        if (s, t) not in self._pairs:
            shared = (*heads.QUERY_SPACES, *heads.KEY_VALUE_SPACES)
            there = [space for space in shared if self._is_collected(space)]
            self._pairs[s, t] = heads.pair_heads(
                {space: self.moments(space, s, t).correlation() for space in there},
                heads.HeadCounts(self.student.num_heads, self.student.num_kv_heads),
                heads.HeadCounts(self.teacher.num_heads, self.teacher.num_kv_heads),
            )
        return self._pairs[s, t]

    def _is_wide(self, site: str) -> bool:
        """Whether heads of either model have more features together than the linear reads that
        writes them."""
        if site not in ("query", "key", "value"):
            return False
        return any(parts.width(site) > parts.hidden_size for parts in (self.teacher, self.student))

    def _on_moments(
        self, moments: Moments, held: Moments | None, span: int | None = None
    ) -> Fitted:
        if self.method not in _FITS_MEANS:
            return fit_lsa(moments, self.scale, absolute=self.method == "lsa_abs")
        if self.method == "procrustes":
            return fit_procrustes(self._about(moments), self.scale, span)
        if moments.cov_xx is None or moments.cov_yy is None:
            raise TransferError(
                f"statistics: the method {self.method!r} expects the Gram matrices of both models, "
                "which were not collected"
            )
        return fit_ridge(
            moments,
            held,
            self.options.ridge,
            means=bool(self.options.means),
            write=self.options.write,
            span=span,
        )

    def _span(self, site: str) -> int | None:
        """Directions that features can have at most: the linear that writes them has no more."""
        reads = next((role.reads for role in ROLES.values() if role.writes == site), None)
        if reads is None:
            return None
        return min(parts.width(reads) for parts in (self.teacher, self.student))

    def _data_free(self, site: str) -> tuple[Tensor, Tensor]:
        return heads.selection_by_heads(
            CONTROLS["truncate" if self.method == "random_matched" else self.method],
            self.student.width(site),
            self.teacher.width(site),
            self.student.heads(site) or 1,
            self.teacher.heads(site) or 1,
            shared=site in heads.KEY_VALUE_SPACES,
        )

    def _generator(self, site: str, s: int, t: int) -> torch.Generator:
        # a number of its own for every map: the order does not depend on which maps are fitted
        number = (self.seed * len(SPACES) + SPACES.index(site)) * 4096 + s
        return torch.Generator().manual_seed(number * 4096 + t)

    def _about(self, moments: Moments) -> Moments:
        """About 0 for a method that can do without means, where they are not carried."""
        centred = self.options.means or self.method not in _FITS_MEANS
        return moments if centred else moments.uncentred()


def _deviation(variance: Tensor) -> float:
    """Of a whole space, sqrt of its mean variance; 1 for one that does not vary."""
    return variance.clamp(min=0).mean().sqrt().item() or 1.0


def _sum(a: Moments, b: Moments) -> Moments:
    pairs = [(getattr(a, part.name), getattr(b, part.name)) for part in fields(Moments)]
    sums: list[Any] = [None if x is None or y is None else x + y for x, y in pairs]
    return Moments(*sums)

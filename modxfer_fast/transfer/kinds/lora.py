"""LoRA through maps.

A_s = A_t read^T [r, d_s]        B_s = write^T B_t [d_s, r]

so the student's update of its own features is the mapped update of what the teacher would have
read. A plain LoRA has no constant term, and what the means add is dropped; maps fitted with
`means=False`, as `fit_maps` does for it, are the best ones without it. With lora_bias it is kept:
b_s = write^T (b_t + B_t A_t offset).

Directions that say nothing, as those by which a rank is raised, have B = 0 and a random A, as PEFT
begins: with both at 0 neither would ever have a gradient.
"""

import math
import re
from collections import Counter

import torch
from peft.utils.other import get_pattern_key
from torch import Tensor

from modxfer_fast.transfer.errors import TransferError
from modxfer_fast.transfer.kinds.base import PeftKind, Source, places_of_every_block, weighted_sum
from modxfer_fast.transfer.maps.scaling import inverse_or_zero

A, B, BIAS = "lora_A.weight", "lora_B.weight", "lora_B.bias"
_ROUNDING = 1e-12
# initialisations that subtract the first B A from the base weights: the file alone is no update of
# the model it names
_SHIFTED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# variants of newer versions of PEFT whose forward or factors are not those of B A
VARIANTS = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)


class LoRA(PeftKind):
    """Updates scaling B A x of linears."""

    name = "lora"
    tensors = r"lora_A\.weight|lora_B\.(?:weight|bias)"
    is_low_rank = True

    def check(self, config):
        refused = {
            "use_dora": config.use_dora,
            "bias": config.bias != "none",
            "fan_in_fan_out": config.fan_in_fan_out,
            "trainable_token_indices": config.trainable_token_indices,
            "layer_replication": config.layer_replication,
            "target_parameters": config.target_parameters,
            "init_lora_weights": str(config.init_lora_weights).lower().startswith(_SHIFTED_BASE),
            **{name: getattr(config, name, None) for name in VARIANTS},
        }
        for name, value in refused.items():
            if value:
                raise TransferError(
                    f"{name}: a LoRA with {name}={getattr(config, name)!r} cannot be moved; its "
                    "update is not B A of linears alone, on top of the base weights"
                )

    def takes_means(self, config):
        return bool(config.lora_bias)

    def scaling(self, config, module, tensors):
        """alpha / r, or alpha / sqrt(r) with rsLoRA."""
        patterns = config.alpha_pattern
        alpha = patterns.get(get_pattern_key(patterns, module), config.lora_alpha)
        rank = tensors[A].shape[0]
        return alpha / (math.sqrt(rank) if config.use_rslora else rank)

    def rewrite(self, sources, combine, *, rank=None, on_features=False, seed=0):
        """A and B, to be scaled as the first source is.

        "single", "mean" and "reference_avg" add factors; "mean_product" adds products and factors
        them again.

        Args:
            rank: to which the combined update is factored again; None: that of the first source.
            on_features: of all updates of that rank take the one whose output on the student's own
                features comes closest to the (weighted) sum of the mapped updates.
            seed: of the rows of A in directions that say nothing.
        """
        factors = [_mapped(source, sources[0].scaling) for source in sources]
        weights = [source.weight for source in sources]
        wanted = factors[0][A].shape[0] if rank is None else rank
        ranks = {parts[A].shape[0] for parts in factors}
        add_products = on_features or combine == "mean_product"
        if add_products:
            ups = [weight * parts[B] for weight, parts in zip(weights, factors, strict=True)]
            up, down = torch.cat(ups, 1), torch.cat([parts[A] for parts in factors])
        elif len(ranks) > 1:
            raise TransferError(
                f"layer_map: expected one rank for {combine!r}, got the ranks {sorted(ranks)}; "
                "'mean_product' averages modules of different ranks"
            )
        else:
            up, down = (
                weighted_sum(weights, [parts[name] for parts in factors]) for name in (B, A)
            )
        if add_products or ranks != {wanted}:
            up, down = truncated(up, down, wanted, _gram(sources[0]) if on_features else None)
        result = {A: _trainable(down, up, seed), B: up}
        if BIAS in factors[0]:
            result[BIAS] = weighted_sum(weights, [parts[BIAS] for parts in factors])
        return result

    def update(self, source):
        return source.tensors[B].double(), source.scaling * source.tensors[A].double()

    def set_sizes(self, config, student, slots, scaling):
        """r and lora_alpha as most slots have them; the others by their full names."""
        config.layers_pattern = None
        config.init_lora_weights = True
        settings = {}
        for slot, tensors in slots.items():
            rank = tensors[A].shape[0]
            alpha = scaling[slot] * (math.sqrt(rank) if config.use_rslora else rank)
            # alpha is an integer in PEFT's signature; 16 / 8 * 8 must not become 16.000000000000004
            settings[slot] = rank, round(alpha) if math.isclose(alpha, round(alpha)) else alpha
        config.r, config.lora_alpha = Counter(settings.values()).most_common(1)[0][0]
        config.rank_pattern, config.alpha_pattern = {}, {}
        for slot, (rank, alpha) in settings.items():
            name = re.escape(student.module_name(slot.layer, slot.place))
            if rank != config.r:
                config.rank_pattern[name] = rank
            if alpha != config.lora_alpha:
                config.alpha_pattern[name] = alpha

    def targets(self, config, student, slots):
        """As for every kind, and the paths inside a block for those of every block."""
        paths = [student.modules[place] for place in places_of_every_block(slots, student) or ()]
        others = [path for path in student.modules.values() if path not in paths]
        if not paths or any(other.endswith(f".{path}") for path in paths for other in others):
            return super().targets(config, student, slots)
        return paths


def truncated(
    up: Tensor, down: Tensor, rank: int, gram: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """B [n, rank] and A [rank, m] with B A closest to up @ down, of equal size in each direction.

    Closest in the Frobenius norm of (up down - B A) gram^(1/2); gram None is the identity. The
    optimum is P P^T up down with P the leading left singular vectors of up down gram^(1/2).
    Directions that it does not need are 0 in both.
    """
    q, r = torch.linalg.qr(up)  # up = q r; the products below have the small inner width
    metric = down @ down.T if gram is None else down @ gram @ down.T
    values, vectors = torch.linalg.eigh(metric)
    left, _, _ = torch.linalg.svd(r @ vectors * values.clamp(min=0).sqrt(), full_matrices=False)
    p = q @ left[:, :rank]
    a = p.T @ up @ down
    size = a.norm(dim=1)
    # rounding of a direction that is not there would be small in both, and so hardly train
    size = torch.where(size > _ROUNDING * size.max(), size, 0.0).sqrt()
    a, b = a * inverse_or_zero(size)[:, None], p * size
    missing = rank - p.shape[1]
    if missing > 0:
        a = torch.cat((a, a.new_zeros(missing, a.shape[1])))
        b = torch.cat((b, b.new_zeros(b.shape[0], missing)), 1)
    return b, a


def _trainable(down: Tensor, up: Tensor, seed: int) -> Tensor:
    """A with random rows, uniform as in `reset_lora_parameters` of PEFT, where both are 0."""
    idle = ~(down.any(1) | up.any(0))
    generator = torch.Generator().manual_seed(seed)
    fresh = torch.rand(down.shape, generator=generator, dtype=down.dtype) * 2 - 1
    return torch.where(idle[:, None], fresh / math.sqrt(down.shape[1]), down)


def _mapped(source: Source, scaling: float) -> dict[str, Tensor]:
    tensors, read, write = source.tensors, source.read, source.write
    ratio = source.scaling / scaling
    parts = {A: read.read_weight(tensors[A]), B: write.write_weight(tensors[B]) * ratio}
    if BIAS in tensors:
        constant = tensors[B].double() @ (tensors[A].double() @ read.offset)
        parts[BIAS] = write.write_weight(tensors[BIAS].double() + constant) * ratio
    return parts


def _gram(source: Source) -> Tensor:
    """Second moments of the student's own features about 0: a LoRA sees them with their mean."""
    gram = None if source.moments is None else source.moments.uncentred().cov_xx
    if gram is None:
        raise TransferError(
            "statistics: expected with the method 'reduced_rank', with the Gram matrices of the "
            "student's features; got none"
        )
    return gram

"""What a row of the loss is, apart from where it is computed."""

import dataclasses
import math

LOSSES = ("mse", "normalized_mse", "cosine", "smooth_l1", "relative")
ROW_LOSSES = LOSSES[:4]  # "relative" is "mse" divided by an energy of the batch
NORMS = ("none", "rms", "layer")
# A row no longer than this has no direction: it counts as the zero vector, without a gradient.
MIN_LENGTH = 1e-12


@dataclasses.dataclass(frozen=True)
class ProjectionSpec:
    """Loss of one row and the norm of both sides before it; formulas in `op.py`.

    Attributes:
        loss: one of LOSSES; row kernels know ROW_LOSSES.
        beta: width of the quadratic part of "smooth_l1"; 0 is the absolute value.
        norm: one of NORMS, without an affine part.
        norm_eps: added to the mean square or the variance.
    """

    loss: str = "mse"
    beta: float = 1.0
    norm: str = "none"
    norm_eps: float = 1e-6

    @classmethod
    def checked(cls, loss: str, beta: float, norm: str, norm_eps: float) -> "ProjectionSpec":
        """Validates what a user passed.

        Raises:
            ValueError: naming the argument, what was expected and what came.
        """
        if loss not in LOSSES:
            raise ValueError(f"loss: expected one of {', '.join(LOSSES)}, got {loss!r}")
        if not (beta >= 0.0 and math.isfinite(beta)):
            raise ValueError(f"beta: expected a number of at least 0, got {beta}")
        if norm not in NORMS:
            raise ValueError(f"norm: expected one of {', '.join(NORMS)}, got {norm!r}")
        if not (norm_eps > 0.0 and math.isfinite(norm_eps)):
            raise ValueError(f"norm_eps: expected a positive number, got {norm_eps}")
        return cls(loss, float(beta), norm, float(norm_eps))

    @property
    def is_direction(self) -> bool:
        """Whether both rows are divided by their length."""
        return self.loss in ("normalized_mse", "cosine")

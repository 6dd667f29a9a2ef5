"""What a row of the loss is, apart from where it is computed."""

import dataclasses

from modxfer_fast.kernels.common import check_number, is_finite
from modxfer_fast.kernels.common.spec import Spec
from modxfer_fast.kernels.names import LOSSES, NORMS, ROW_LOSSES

# A row no longer than this has no direction: it counts as the zero vector, without a gradient.
MIN_LENGTH = 1e-12


@dataclasses.dataclass(frozen=True)
class ProjectionSpec(Spec):
    """Loss of one row and the norm of both sides before it; formulas in `op.py`.

    Attributes:
        loss: one of LOSSES; row kernels know ROW_LOSSES.
        norm: one of NORMS, without an affine part.
        beta: width of the quadratic part of "smooth_l1"; 0 is the absolute value.
        norm_eps: added to the mean square or the variance.
    """

    loss: str = "mse"
    norm: str = "none"
    beta: float = 1.0
    norm_eps: float = 1e-6

    @classmethod
    def checked(cls, loss: str, beta: float | None, norm: str, norm_eps: float) -> "ProjectionSpec":
        """Validates what a user passed.

        Args:
            beta: None is 1. Given beside a loss that does not read it, it is an error.

        Raises:
            ValueError, TypeError: naming the argument, what was expected and what came.
        """
        if loss not in LOSSES:
            raise ValueError(f"loss: expected one of {', '.join(LOSSES)}, got {loss!r}")
        if beta is None:
            beta = 1.0
        else:
            check_number("beta", beta)
            if not (beta >= 0.0 and is_finite(beta)):
                raise ValueError(f"beta: expected a number of at least 0, got {beta}")
            if loss != "smooth_l1":
                raise ValueError(
                    "beta: expected it with loss 'smooth_l1' alone, which reads it, "
                    f"got beta={beta} with loss {loss!r}"
                )
        if norm not in NORMS:
            raise ValueError(f"norm: expected one of {', '.join(NORMS)}, got {norm!r}")
        check_number("norm_eps", norm_eps)
        if not (norm_eps > 0.0 and is_finite(norm_eps)):
            raise ValueError(f"norm_eps: expected a positive number, got {norm_eps}")
        return cls(loss, norm, float(beta), float(norm_eps))

    @property
    def is_direction(self) -> bool:
        """Whether both rows are divided by their length."""
        return self.loss in ("normalized_mse", "cosine")

    def csrc(self) -> tuple[int, float, int, float]:
        """As the compiled ops take it: loss, beta, norm, norm_eps."""
        return ROW_LOSSES.index(self.loss), self.beta, NORMS.index(self.norm), self.norm_eps

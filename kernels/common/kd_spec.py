"""What is computed, apart from where: the scalars that every KD row kernel takes."""

import dataclasses

from modxfer_fast.kernels.common.scalars import check_number, is_finite
from modxfer_fast.kernels.common.spec import Spec
from modxfer_fast.kernels.divergences import DIVERGENCES, WITH_BETA


@dataclasses.dataclass(frozen=True)
class KDSpec(Spec):
    """Divergence and weights of one KD loss, from a job file to the row kernels; p is the teacher.

    Attributes:
        divergence: a name of `kernels.divergences`, where its formula stands.
        beta: weight of the teacher in a mixture of p and q; None is 0.5.
        temperature: divides both rows of logits before the softmax of the divergence.
        kd_weight: factor of the divergence.
        ce_weight: factor of the cross entropy with the label, always at temperature 1.
        scale_by_temperature_squared: whether kd_weight is multiplied by temperature squared.

    Row kernels take one that is `checked`.
    """

    divergence: str = "forward_kl"
    beta: float | None = None
    temperature: float = 1.0
    kd_weight: float = 1.0
    ce_weight: float = 0.0
    scale_by_temperature_squared: bool = False

    def checked(self) -> "KDSpec":
        """Validates what a user passed, and resolves it to what the row kernels read.

        A divergence at an end of beta becomes what it is there, beta is a number strictly inside
        (0, 1), and kd_weight holds temperature squared where it is wanted.

        Raises:
            ValueError, TypeError: naming the argument, what was expected and what came. A beta
                beside another divergence, which does not read it, is an error: libraries in which
                beta alone chooses the divergence would mean a JSD.
        """
        divergence, beta, temperature = self.divergence, self.beta, self.temperature
        kd_weight, ce_weight = self.kd_weight, self.ce_weight
        if divergence not in DIVERGENCES:
            raise ValueError(
                f"divergence: expected one of {', '.join(DIVERGENCES)}, got {divergence!r}"
            )
        if beta is None:
            beta = 0.5
        else:
            check_number("beta", beta)
            if not 0.0 <= beta <= 1.0:
                raise ValueError(f"beta: expected a number in [0, 1], got {beta}")
            if not DIVERGENCES[divergence].reads_beta:
                raise ValueError(
                    f"beta: expected it with divergence {WITH_BETA!r} alone, which reads it, "
                    f"got beta={beta} with divergence {divergence!r}"
                )
        check_number("temperature", temperature)
        if not (temperature > 0.0 and is_finite(temperature)):
            raise ValueError(f"temperature: expected a positive number, got {temperature}")
        for name, value in (("kd_weight", kd_weight), ("ce_weight", ce_weight)):
            check_number(name, value)
            if not is_finite(value):
                raise ValueError(f"{name}: expected a finite number, got {value}")
        ends = DIVERGENCES[divergence].ends
        if ends is not None and beta in (0.0, 1.0):
            divergence = ends[int(beta)]
        if self.scale_by_temperature_squared:
            kd_weight *= temperature**2
        return KDSpec(
            divergence, float(beta), float(temperature), float(kd_weight), float(ce_weight)
        )

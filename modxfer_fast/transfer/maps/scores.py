"""How well a map fits, from moments alone.

cka          linear CKA of the two spaces: ||C_st||_F^2 / (||C_ss||_F ||C_tt||_F)
correlation  mean Pearson correlation of the teacher features that the map predicts with what it
             predicts; for an assignment the mean matched correlation
r2_read      mean over teacher features of 1 - error / variance of the prediction from the student
r2_write     the same for student features predicted by `write`

All are of deviations from the means. A feature that does not vary is left out; one that a map
leaves at its mean counts as 0. r2 can be negative: selections and rotations are not fitted to it.
"""

from torch import Tensor

from modxfer_fast.transfer.maps.scaling import deviations, inverse_or_zero
from modxfer_fast.transfer.moments import Moments
from modxfer_fast.transfer.statistics import linear_cka


def scores(read: Tensor, write: Tensor, moments: Moments) -> dict[str, float]:
    """The scores above that the moments allow: those of dense maps need the Gram matrices."""
    result = {"tokens": float(moments.count)}
    if moments.cov_xx is not None and moments.cov_yy is not None:
        result["cka"] = linear_cka(moments)
    forward = _prediction(read, moments)
    if forward is not None:
        result["correlation"], result["r2_read"] = forward
    backward = _prediction(write, moments.swapped())
    if backward is not None:
        result["r2_write"] = backward[1]
    return result


def _prediction(matrix: Tensor, moments: Moments) -> tuple[float, float] | None:
    """Mean correlation and mean r2 of x @ matrix with y."""
    covariance = (matrix * moments.cov_xy).sum(0)
    if ((matrix != 0).sum(0) <= 1).all():
        variance = (matrix * matrix).T @ moments.var_x
    elif moments.cov_xx is not None:
        variance = (matrix * (moments.cov_xx @ matrix)).sum(0)
    else:
        return None
    std_y = deviations(moments.var_y)
    varies = std_y > 0
    if not varies.any():
        return 0.0, 0.0
    r2 = (2 * covariance - variance) * inverse_or_zero(std_y**2)
    predicted = varies & (variance > 0)
    correlation = covariance * inverse_or_zero(std_y * variance.clamp(min=0).sqrt())
    mean = correlation[predicted].mean().item() if predicted.any() else 0.0
    return mean, r2[varies].mean().item()

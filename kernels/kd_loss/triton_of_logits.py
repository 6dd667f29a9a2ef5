"""What the Triton row kernels add for divergences of the logits themselves.

x student's, y teacher's logits divided by the temperature

    logits_mse      sum gap^2 / V    gap = x - y            u = 2 / V gap
    logits_cosine   sum gap^2 / 2    gap = x/|x| - y/|y|    u = (gap - D x/|x|) / |x|

The second is 1 - x y / (|x| |y|), and does not cancel where the rows are near. Its row is read once
more for the lengths.
"""

import triton
import triton.language as tl

from modxfer_fast.kernels.kd_loss.triton_of_row import INF
from modxfer_fast.kernels.kd_loss.triton_softmax import load_bent


@triton.jit
def _power_of_2(x):
    """The one below x, a normal number."""
    return (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def _unit_scale(row, V, BLOCK_V: tl.constexpr, BEND: tl.constexpr):
    """near, far: z near far is the row z [V] of length 1; far is 0 of a row of zeros.

    near is a power of 2, by which a product is exact: equal rows have a gap of 0, to the bit,
    contracted to an fma or not. Squares are summed relative to the largest that a lane has seen.
    """
    top = tl.full([BLOCK_V], 1e-30, tl.float32)
    total = tl.zeros([BLOCK_V], tl.float32)
    for i in range(tl.cdiv(V, BLOCK_V)):
        offs_v = i * BLOCK_V + tl.arange(0, BLOCK_V)
        z = load_bent(row, offs_v, V, BEND)
        z = tl.where(z == -INF, 0.0, z)
        higher = tl.minimum(tl.maximum(top, tl.abs(z)), 1e30)
        keep = top / higher
        part = z / higher
        total = total * (keep * keep) + part * part
        top = higher
    most = tl.max(top, axis=0)
    keep = top / most
    squared = tl.sum(total * (keep * keep), axis=0)
    near = 1.0 / _power_of_2(most)
    length = tl.sqrt(squared) * (most * near)
    return near, tl.where(squared == 0, 0.0, 1.0 / tl.where(squared == 0, 1.0, length))


@triton.jit
def _gap(z_s, z_t, near_s, far_s, near_t, far_t):
    """gap of each class: 0 where both sides exclude it, infinite where one does."""
    x = tl.where(z_s == -INF, 0.0, z_s) * near_s
    y = tl.where(z_t == -INF, 0.0, z_t) * near_t
    gap = far_s * (x - y) + (far_s - far_t) * y
    return tl.where((z_s == -INF) != (z_t == -INF), INF, gap), x


@triton.jit
def of_logits_terms(z_s, z_t, of_row):
    """u of each class; of_row: that of `of_logits_sums`."""
    near_s, far_s, near_t, far_t, slope, pull = of_row
    gap, x = _gap(z_s, z_t, near_s, far_s, near_t, far_t)
    return slope * (gap - pull * x)


@triton.jit
def _squares(
    student, teacher,                    # in   [V], as of load_classes
    V,
    inv_temperature,
    DIVERGENCE: tl.constexpr, BLOCK_V: tl.constexpr, BEND_S: tl.constexpr, BEND_T: tl.constexpr,
):  # fmt: skip
    """Of a mean the sum of squared gaps, of a cosine the distance; and both rows' near and far."""
    near_s = 1.0
    near_t = 1.0
    far_s = inv_temperature
    far_t = inv_temperature
    if DIVERGENCE == "logits_cosine":
        near_s, far_s = _unit_scale(student, V, BLOCK_V, BEND_S)
        near_t, far_t = _unit_scale(teacher, V, BLOCK_V, BEND_T)
    squares = tl.zeros([BLOCK_V], tl.float32)
    num_tiles = tl.cdiv(V, BLOCK_V)
    for i in range(num_tiles):
        offs_v = (num_tiles - 1 - i) * BLOCK_V + tl.arange(0, BLOCK_V)
        z_s = load_bent(student, offs_v, V, BEND_S)
        z_t = load_bent(teacher, offs_v, V, BEND_T)
        gap, _ = _gap(z_s, z_t, near_s, far_s, near_t, far_t)
        squares += gap * gap
    kd = tl.sum(squares, axis=0)
    if DIVERGENCE == "logits_cosine":
        # a row of zeros has a right angle to every other
        kd *= tl.where((far_s == 0) == (far_t == 0), 0.5, 1.0)
    return kd, near_s, far_s, near_t, far_t


@triton.jit
def _of_row(kd, near_s, far_s, near_t, far_t, mse_slope, inv_temperature, DIVERGENCE: tl.constexpr):
    """What `of_logits_terms` takes."""
    slope = mse_slope
    pull = 0.0
    if DIVERGENCE == "logits_cosine":
        slope = tl.minimum(near_s * far_s / inv_temperature, 3e38)
        pull = kd * far_s
    return near_s, far_s, near_t, far_t, slope, pull


@triton.jit
def of_logits_sums(
    student, teacher,                    # in   [V], as of load_classes
    V,
    logd_s, logd_t, inv_temperature,
    DIVERGENCE: tl.constexpr, BLOCK_V: tl.constexpr, BEND_S: tl.constexpr, BEND_T: tl.constexpr,
):  # fmt: skip
    """The divergence, the 0 that has the place of sum u, and what `of_logits_terms` takes.

    The 0 is NaN of a row with NaN, +inf or no class.
    """
    kd, near_s, far_s, near_t, far_t = _squares(
        student, teacher, V, inv_temperature, DIVERGENCE, BLOCK_V, BEND_S, BEND_T
    )
    if DIVERGENCE == "logits_mse":
        kd /= V
    of_row = _of_row(kd, near_s, far_s, near_t, far_t, 2.0 / V, inv_temperature, DIVERGENCE)
    zero = 0.0 * (logd_s + logd_t)
    return kd + zero, zero, of_row


@triton.jit
def store_logit_parts(
    sums_ptr,                            # out  [2], or [3] of a cosine
    student, teacher,                    # in   [V], as of load_classes; of a rank
    V,
    inv_temperature,
    DIVERGENCE: tl.constexpr, BLOCK_V: tl.constexpr, BEND_S: tl.constexpr, BEND_T: tl.constexpr,
):  # fmt: skip
    """`sums` of the divergence's record."""
    kd, near_s, far_s, near_t, far_t = _squares(
        student, teacher, V, inv_temperature, DIVERGENCE, BLOCK_V, BEND_S, BEND_T
    )
    if DIVERGENCE == "logits_mse":
        tl.store(sums_ptr, kd)
        tl.store(sums_ptr + 1, V * 1.0)
    else:
        tl.store(sums_ptr, _length(near_s * far_s, inv_temperature))
        tl.store(sums_ptr + 1, _length(near_t * far_t, inv_temperature))
        tl.store(sums_ptr + 2, kd)


@triton.jit
def _length(inverse, inv_temperature):
    return tl.where(inverse == 0, 0.0, inv_temperature / tl.where(inverse == 0, 1.0, inverse))


@triton.jit
def _scale_of(length, inv_temperature):
    """near and far of a row x of that length, whose logits are x / inv_temperature."""
    of_z = length / inv_temperature
    near = 1.0 / _power_of_2(tl.minimum(tl.maximum(of_z, 1e-30), 1e30))
    return near, tl.where(of_z == 0, 0.0, 1.0 / tl.where(of_z == 0, 1.0, of_z * near))


@triton.jit
def load_of_logits(
    numbers_ptr,                         # in   [1], or [3] of a cosine
    inv_temperature,
    DIVERGENCE: tl.constexpr,
):  # fmt: skip
    """What `of_logits_terms` takes, from the numbers of the record's `value`."""
    first = tl.load(numbers_ptr)
    kd = first
    near_s = 1.0
    near_t = 1.0
    far_s = inv_temperature
    far_t = inv_temperature
    if DIVERGENCE == "logits_cosine":
        near_s, far_s = _scale_of(first, inv_temperature)
        near_t, far_t = _scale_of(tl.load(numbers_ptr + 1), inv_temperature)
        kd = tl.load(numbers_ptr + 2)
    return _of_row(kd, near_s, far_s, near_t, far_t, first, inv_temperature, DIVERGENCE)

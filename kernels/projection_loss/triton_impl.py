"""Projection loss rows, one program per row, one launch for loss and gradient.

M rows   D width   a, b = student's and teacher's row after norm and direction   e = a - b

Passes over the two rows; the formulas are those of `reference.py`:

    1  mean and scale of both rows; two walks for "layer", none without a norm or a direction
    2  sum f, and the sums over g = dL/da that the gradient of a statistic needs
    3  dz = row_weight s (g - mean(g) [layer] - a k); joins pass 2 when there are no statistics

Passes that write go left to right, because dz may lie over z with half its width.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.driver import driver

from modxfer_fast.kernels import env
from modxfer_fast.kernels.common import triton_device
from modxfer_fast.kernels.projection_loss.spec import MIN_LENGTH, ProjectionSpec
from modxfer_fast.kernels.projection_loss.stream import stream

available = triton_device.available
supports = triton_device.supports


@triton.jit
def _load_centred(row_ptr, offs_d, D, mean, CENTRED: tl.constexpr):
    """fp32 columns less the mean; 0 past the end of the row."""
    mask_d = offs_d < D
    x = tl.load(row_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    if CENTRED:
        x = tl.where(mask_d, x - mean, 0.0)
    return x


@triton.jit
def _mean_and_scale(
    row_ptr, D, norm_eps, min_length,
    NORM: tl.constexpr, IS_DIRECTION: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Pass 1: a = (x - mean) scale; scale is 0 where the row has no direction."""
    mean = 0.0
    if NORM == "layer":
        total = tl.zeros([BLOCK_D], tl.float32)
        for d in range(0, D, BLOCK_D):
            total += _load_centred(row_ptr, d + tl.arange(0, BLOCK_D), D, 0.0, False)
        mean = tl.sum(total, axis=0) / D
    scale = 1.0
    if NORM != "none" or IS_DIRECTION:
        squares = tl.zeros([BLOCK_D], tl.float32)
        for d in range(0, D, BLOCK_D):
            offs_d = d + tl.arange(0, BLOCK_D)
            x = _load_centred(row_ptr, offs_d, D, mean, NORM == "layer")
            squares += x * x
        square = tl.sum(squares, axis=0)
        if NORM != "none":
            scale = 1.0 / tl.sqrt(square / D + norm_eps)
        if IS_DIRECTION:
            length = tl.sqrt(square) * scale
            scale = tl.where(length > min_length, scale / tl.where(length > 0, length, 1.0), 0.0)
    return mean, scale


@triton.jit
def _terms(e, beta, inv_beta, LOSS: tl.constexpr):
    """f, addend of the loss, and g, its derivative in a; both up to a factor of the row."""
    if LOSS == "smooth_l1":
        size = tl.abs(e)
        # 0 / 0 at e = 0 when beta is 0
        ratio = tl.where(size == 0, 0.0, tl.minimum(size * inv_beta, 1.0))
        f = ratio * (size - 0.5 * tl.minimum(size, beta))
        g = tl.where(e < 0, -ratio, ratio)
    else:
        f = e * e
        g = e
    return f, g


@triton.jit
def _projection_loss_kernel(
    z_ptr, t_ptr,                        # in   [M, D]
    row_weights_ptr,                     # in   [M], fp32
    loss_ptr,                            # out  [M], fp32
    dz_ptr,                              # out  [M, D], or None
    D,
    stride_zm, stride_tm, stride_wm, stride_dm,
    f_factor, g_factor, beta, inv_beta, norm_eps, min_length,
    LOSS: tl.constexpr, NORM: tl.constexpr, IS_DIRECTION: tl.constexpr, HAS_GRAD: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    # M * D passes 2^31 with a long batch: widen before multiplying by a stride
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * stride_zm
    t_ptr += row * stride_tm
    if HAS_GRAD:
        dz_ptr += row * stride_dm
    row_weight = tl.load(row_weights_ptr + row * stride_wm)
    if row_weight == 0:
        # nothing is read: the row may hold anything
        tl.store(loss_ptr + row, 0.0)
        if HAS_GRAD:
            zeros = tl.zeros([BLOCK_D], dz_ptr.dtype.element_ty)
            for d in range(0, D, BLOCK_D):
                offs_d = d + tl.arange(0, BLOCK_D)
                tl.store(dz_ptr + offs_d, zeros, mask=offs_d < D)
    else:
        HAS_STATISTICS: tl.constexpr = NORM != "none" or IS_DIRECTION
        CENTRED: tl.constexpr = NORM == "layer"
        mean_z, scale_z = _mean_and_scale(
            z_ptr, D, norm_eps, min_length, NORM, IS_DIRECTION, BLOCK_D
        )
        mean_t, scale_t = _mean_and_scale(
            t_ptr, D, norm_eps, min_length, NORM, IS_DIRECTION, BLOCK_D
        )
        grad = row_weight * g_factor * scale_z
        f_sum = tl.zeros([BLOCK_D], tl.float32)
        ga_sum = tl.zeros([BLOCK_D], tl.float32)
        g_sum = tl.zeros([BLOCK_D], tl.float32)
        for d in range(0, D, BLOCK_D):
            offs_d = d + tl.arange(0, BLOCK_D)
            a = _load_centred(z_ptr, offs_d, D, mean_z, CENTRED) * scale_z
            b = _load_centred(t_ptr, offs_d, D, mean_t, CENTRED) * scale_t
            f, g = _terms(a - b, beta, inv_beta, LOSS)
            f_sum += f
            if HAS_GRAD and HAS_STATISTICS:
                ga_sum += g * a
                if CENTRED:
                    g_sum += g
            if HAS_GRAD and not HAS_STATISTICS:
                # without this barrier one warp may overwrite columns that another has yet to load
                tl.debug_barrier()
                dz = (grad * g).to(dz_ptr.dtype.element_ty)
                tl.store(dz_ptr + offs_d, dz, mask=offs_d < D)
        loss = f_factor * tl.sum(f_sum, axis=0)
        if LOSS == "cosine":
            # 1 - cos is half the squared distance of two directions; next to a row without one, 1
            loss += tl.where(scale_z == 0, 0.5, 0.0) + tl.where(scale_t == 0, 0.5, 0.0)
        tl.store(loss_ptr + row, loss)
        if HAS_GRAD and HAS_STATISTICS:
            k = tl.sum(ga_sum, axis=0)
            if not IS_DIRECTION:
                k = k / D
            g_mean = 0.0
            if CENTRED:
                g_mean = tl.sum(g_sum, axis=0) / D
            for d in range(0, D, BLOCK_D):
                offs_d = d + tl.arange(0, BLOCK_D)
                a = _load_centred(z_ptr, offs_d, D, mean_z, CENTRED) * scale_z
                b = _load_centred(t_ptr, offs_d, D, mean_t, CENTRED) * scale_t
                _, g = _terms(a - b, beta, inv_beta, LOSS)
                tl.debug_barrier()
                dz = (grad * (g - a * k - g_mean)).to(dz_ptr.dtype.element_ty)
                tl.store(dz_ptr + offs_d, dz, mask=offs_d < D)


def projection_loss_rows(
    z: Tensor, t: Tensor, row_weights: Tensor, spec: ProjectionSpec, dz: Tensor | None
) -> Tensor:
    """Loss of each row and, where asked for, the gradient of sum(row_weights * loss).

    Args:
        z, t: [M, D], last stride 1, any row stride.
        row_weights: [M] fp32; a row of weight 0 is not read.
        dz: [M, D], last stride 1, or None; may be z, or a half-precision view of its buffer in
            which every row begins where the row of z begins.

    Returns:
        [M] fp32, unweighted, 0 where the weight is.
    """
    rows, width = z.shape
    loss = z.new_empty(rows, dtype=torch.float32)
    if rows == 0:
        return loss
    block_d, num_warps = _row_tile(width, warp_size=64 if torch.version.hip else 32)
    per_column = 1.0 / width
    f_factor, g_factor = {
        "mse": (per_column, 2.0 * per_column),
        "smooth_l1": (per_column, per_column),
        "normalized_mse": (1.0, 2.0),
        "cosine": (0.5, 1.0),
    }[spec.loss]
    with torch.cuda.device_of(z):
        _projection_loss_kernel[(rows,)](
            z,
            t,
            row_weights,
            loss,
            dz,
            D=width,
            stride_zm=z.stride(0),
            stride_tm=t.stride(0),
            stride_wm=row_weights.stride(0),
            stride_dm=0 if dz is None else dz.stride(0),
            f_factor=f_factor,
            g_factor=g_factor,
            beta=spec.beta,
            inv_beta=1.0 / spec.beta if spec.beta else float("inf"),
            norm_eps=spec.norm_eps,
            min_length=MIN_LENGTH,
            LOSS=spec.loss,
            NORM=spec.norm,
            IS_DIRECTION=spec.is_direction,
            HAS_GRAD=dz is not None,
            BLOCK_D=block_d,
            num_warps=num_warps,
            # z * s - t * s of equal rows is 0 only if neither product stays unrounded in an FMA
            enable_fp_fusion=False,
            **_registers(dz is not None),
        )
    return loss


def _row_tile(width: int, warp_size: int) -> tuple[int, int]:
    """Columns of a tile, and warps of the program that walks along a row of `width`.

    A thread holds eight neighbouring columns, 16 bytes of a half-precision row. A row up to a tile
    is in registers for one pass, and comes from the first cache for the passes after it.
    """
    block_d = min(4096, max(128, 1 << (width - 1).bit_length()))
    return block_d, max(1, block_d // (8 * warp_size))


def _registers(has_grad: bool) -> dict[str, int]:
    """The loss alone may have as many registers as two programs of 512 threads leave each other:
    without a limit ptxas, as Triton 3.6 has it, spills to keep to 32."""
    if has_grad or env.triton_interpreted():
        return {}
    return {"maxnreg": 64} if driver.active.get_current_target().backend == "cuda" else {}


projection_loss_fwd = functools.partial(stream, projection_loss_rows)

"""Means, variances and covariances of many pairs of feature sites, in one pass over the tokens.

    moments = StreamingMoments([768], [1024], pairs=[(0, 0)])
    for batch in batches:
        moments.update([student_features], [teacher_features], mask=tokens_that_count)
    moments.moments(0, 0).correlation()                      # Pearson, [768, 1024]

A site is a place whose features are rows: x sites are the student's, y sites the teacher's, and the
rows of all sites belong to the same tokens. Rows are gathered into chunks of CHUNK_ROWS, and a full
chunk goes through the kernels of room `correlation`, so neither the length of the stream nor how it
is cut into batches shows in the time per token, the memory, or (on a CPU) a bit of the result.

Memory: 4 CHUNK_ROWS D bytes a site; 8 D_x D_y bytes a pair, 8 D^2 a site with a Gram matrix.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from modxfer_fast.kernels.common import check_float, check_row_tensor, without_autocast
from modxfer_fast.kernels.correlation.op import (
    MAX_ROWS,
    correlation_centre,
    correlation_gram,
    correlation_product,
)

CHUNK_ROWS = MAX_ROWS


@dataclasses.dataclass(frozen=True)
class Moments:
    """Moments of one pair of sites over `count` rows, fp64; variances are divided by `count`.

    Attributes:
        mean_x, var_x: [D_x]. The variance of a feature that is constant is 0.
        mean_y, var_y: [D_y].
        cov_xx: [D_x, D_x], or None where it was not asked for; cov_yy: [D_y, D_y], likewise.
        cov_xy: [D_x, D_y].
    """

    count: int
    mean_x: Tensor
    mean_y: Tensor
    var_x: Tensor
    var_y: Tensor
    cov_xx: Tensor | None
    cov_yy: Tensor | None
    cov_xy: Tensor

    def correlation(self) -> Tensor:
        """Pearson correlation [D_x, D_y] in [-1, 1]; 0 for a constant feature."""
        scaled = self.cov_xy * _inverse_std(self.var_x)[:, None]
        return scaled.mul_(_inverse_std(self.var_y)).clamp_(-1.0, 1.0)


class StreamingMoments:
    """Accumulates what `Moments` of chosen pairs of sites need; order and cut of the rows are free.

    Args:
        x_widths, y_widths: features of each site.
        pairs: (a, b): site a of x with site b of y.
        gram_x, gram_y: whether the covariances within the x sites, and the y sites, are wanted.
        device: of the accumulators and of every tensor that `update` gets.
        backend: "triton", "cpp" or "reference"; None takes the best available.
        chunk_rows: rows that are multiplied at once.

    Raises:
        ValueError: a width or `chunk_rows` below 1, a pair that names no site, or twice the same.
    """

    def __init__(
        self,
        x_widths: Sequence[int],
        y_widths: Sequence[int],
        pairs: Sequence[tuple[int, int]],
        *,
        gram_x: bool = True,
        gram_y: bool = True,
        device: str | torch.device = "cpu",
        backend: str | None = None,
        chunk_rows: int = CHUNK_ROWS,
    ):
        self.x_widths = _checked_widths("x_widths", x_widths)
        self.y_widths = _checked_widths("y_widths", y_widths)
        self.pairs = _checked_pairs(pairs, len(self.x_widths), len(self.y_widths))
        if chunk_rows < 1:
            raise ValueError(f"chunk_rows: expected a positive integer, got {chunk_rows}")
        self.device = torch.empty(0, device=device).device  # "cuda" becomes "cuda:0"
        self._backend, self._chunk_rows = backend, chunk_rows
        with torch.inference_mode(False):
            self._count = torch.zeros((), dtype=torch.int64, device=self.device)
            self._xs = self._make_sites("xs", self.x_widths, gram_x)
            self._ys = self._make_sites("ys", self.y_widths, gram_y)
            self._products = {
                (a, b): self._zeros(self.x_widths[a], self.y_widths[b]) for a, b in self.pairs
            }
        self._work_dtype = torch.float32
        self._filled = 0
        # rows that do not count are left out where finding them costs no wait, else multiplied as 0
        self._packs = self.device.type == "cpu"
        self._mask: Tensor | None = None  # of the rows that wait, where they are not packed

    def update(
        self, xs: Sequence[Tensor], ys: Sequence[Tensor], mask: Tensor | None = None
    ) -> None:
        """Takes n more rows of every site; nothing is kept of the tensors.

        Args:
            xs, ys: [n, width] of each site, fp64, fp32, fp16 or bf16. fp64 is multiplied in fp64.
            mask: [n] bool; rows with False do not count, and may hold anything. None counts all.

        Raises:
            ValueError, TypeError: naming the tensor, what was expected and what came.
            BackendError: the backend asked for cannot run these inputs.
        """
        rows = self._check(xs, ys, mask)
        with torch.inference_mode(False), torch.no_grad(), without_autocast(self.device.type):
            if any(tensor.dtype == torch.float64 for tensor in rows):
                self._widen()
            kept = None
            if mask is not None and self._packs:
                kept, mask = mask.nonzero().squeeze(1), None
            total = rows[0].shape[0] if kept is None else len(kept)
            first = 0
            while first < total:
                last = min(total, first + self._chunk_rows - self._filled)
                chosen = slice(first, last) if kept is None else kept[first:last]
                counts = None if mask is None else mask[chosen]
                self._append([tensor[chosen] for tensor in rows], counts)
                first = last

    @property
    def count(self) -> int:
        """Rows that counted so far."""
        self._flush()
        return int(self._count)

    def moments(self, a: int, b: int) -> Moments:
        """Moments of x site a and y site b over all rows so far.

        Raises:
            ValueError: not a pair of this object, no row counted, or a feature was NaN or infinite
                in a row that counted (the message names it).
        """
        if (a, b) not in self._products:
            known = ", ".join(map(str, self.pairs))
            raise ValueError(f"moments: expected one of the pairs {known}, got {(a, b)}")
        count = self.count
        if count == 0:
            raise ValueError("moments: expected at least one row that counts, got none")
        x, y = self._xs[a], self._ys[b]
        product = self._products[a, b]
        x.check_finite()
        y.check_finite()
        if not product.isfinite().all():
            raise ValueError(_too_large(f"{x.name} and {y.name}"))
        (mean_x, var_x, cov_xx), (mean_y, var_y, cov_yy) = x.moments(count), y.moments(count)
        cov_xy = (product / count).sub_(torch.outer(x.sums[0] / count, y.sums[0] / count))
        return Moments(count, mean_x, mean_y, var_x, var_y, cov_xx, cov_yy, cov_xy)

    def merge(self, other: "StreamingMoments") -> None:
        """Adds the rows that another object of the same sites and pairs has taken.

        Raises:
            ValueError: other widths, pairs, Gram matrices or device.
        """
        for name in ("x_widths", "y_widths", "pairs", "device"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                raise ValueError(f"other: expected {name} {mine}, got {theirs}")
        for mine, theirs in zip(self._sites(), other._sites(), strict=True):
            if (mine.gram is None) != (theirs.gram is None):
                raise ValueError(f"other: expected Gram matrices where these are, at {mine.name}")
        self._flush()
        other._flush()
        if other._work_dtype == torch.float64:
            self._widen()
        for mine, theirs in zip(self._sites(), other._sites(), strict=True):
            if theirs.shift is not None and mine.shift is None:
                mine.shift = theirs.shift.clone()
        # products first: they need the sums of both sides as they are
        for (a, b), product in self._products.items():
            _merge_products(
                product, other._products[a, b], self._xs[a], self._ys[b],
                other._xs[a], other._ys[b], other._count,
            )  # fmt: skip
        for mine, theirs in zip(self._sites(), other._sites(), strict=True):
            mine.merge(theirs, other._count)
        self._count += other._count

    def state_dict(self) -> dict[str, Tensor]:
        """All sums, without copying them: "count", "x.0.sums", "product.0.0", ..."""
        self._flush()
        state = {
            "count": self._count,
            "x_widths": torch.tensor(self.x_widths, dtype=torch.int64),
            "y_widths": torch.tensor(self.y_widths, dtype=torch.int64),
            "pairs": torch.tensor(self.pairs, dtype=torch.int64).reshape(-1, 2),
        }
        for side, sites in (("x", self._xs), ("y", self._ys)):
            for index, site in enumerate(sites):
                state[f"{side}.{index}.shift"] = site.shift_or_zero()
                state[f"{side}.{index}.sums"] = site.sums
                if site.gram is not None:
                    state[f"{side}.{index}.gram"] = site.symmetric_gram()
        for (a, b), product in self._products.items():
            state[f"product.{a}.{b}"] = product
        return state

    @classmethod
    def from_state_dict(
        cls,
        state: Mapping[str, Tensor],
        *,
        device: str | torch.device = "cpu",
        backend: str | None = None,
    ) -> "StreamingMoments":
        """The object whose `state_dict` this is, ready for more rows; copies the tensors.

        Raises:
            ValueError: an entry is missing, or has another shape than the widths say.
        """
        for name in ("count", "x_widths", "y_widths", "pairs"):
            _entry(state, name, None)
        new = cls(
            state["x_widths"].tolist(),
            state["y_widths"].tolist(),
            [tuple(pair) for pair in state["pairs"].tolist()],
            gram_x="x.0.gram" in state,
            gram_y="y.0.gram" in state,
            device=device,
            backend=backend,
        )
        new._count.copy_(state["count"])
        for side, sites in (("x", new._xs), ("y", new._ys)):
            for index, site in enumerate(sites):
                for name in ("sums", "gram"):
                    values = getattr(site, name)
                    if values is not None:
                        values.copy_(_entry(state, f"{side}.{index}.{name}", values.shape))
                shift = _entry(state, f"{side}.{index}.shift", (site.width,))
                if int(state["count"]) > 0:
                    site.shift = shift.to(new.device, torch.float64, copy=True)
                if (shift != shift.float()).any():
                    new._widen()
        for (a, b), product in new._products.items():
            product.copy_(_entry(state, f"product.{a}.{b}", product.shape))
        return new

    def _make_sites(self, side: str, widths: tuple[int, ...], gram: bool) -> list["_Site"]:
        def make(index: int, width: int) -> _Site:
            products = self._zeros(width, width) if gram else None
            return _Site(f"{side}[{index}]", self._zeros(2, width), products)

        return [make(index, width) for index, width in enumerate(widths)]

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=self.device)

    def _sites(self) -> list["_Site"]:
        return [*self._xs, *self._ys]

    def _check(self, xs, ys, mask) -> list[Tensor]:
        for name, tensors, sites in (("xs", xs, self._xs), ("ys", ys, self._ys)):
            if len(tensors) != len(sites):
                raise ValueError(f"{name}: expected {len(sites)} tensors, got {len(tensors)}")
        rows = [*xs, *ys]
        for tensor, site in zip(rows, self._sites(), strict=True):
            check_float(site.name, tensor)
            if tensor.dim() != 2 or tensor.shape[1] != site.width:
                raise ValueError(
                    f"{site.name}: expected shape [n, {site.width}], got {tuple(tensor.shape)}"
                )
            if tensor.shape[0] != rows[0].shape[0]:
                raise ValueError(
                    f"{site.name}: expected {rows[0].shape[0]} rows as in xs[0], "
                    f"got {tensor.shape[0]}"
                )
            if tensor.device != self.device:
                raise ValueError(
                    f"{site.name}: expected the device {self.device}, got {tensor.device}"
                )
        check_row_tensor("mask", mask, rows[0].shape[:1], "xs[0]", rows[0])
        if mask is not None and mask.dtype != torch.bool:
            raise TypeError(f"mask: expected torch.bool, got {mask.dtype}")
        return rows

    def _widen(self) -> None:
        """From now on rows are multiplied in fp64; those that wait are taken as they are."""
        if self._work_dtype != torch.float64:
            self._flush()
            self._work_dtype = torch.float64
            for site in self._sites():
                site.buffer = None

    def _append(self, blocks: list[Tensor], mask: Tensor | None) -> None:
        """At most as many rows as the buffers have room for; a whole chunk does not go through."""
        rows = blocks[0].shape[0]
        if rows == self._chunk_rows:
            self._take(blocks, mask)
            return
        waiting = slice(self._filled, self._filled + rows)
        for site, block in zip(self._sites(), blocks, strict=True):
            self._buffer(site)[waiting].copy_(block)
        if not self._packs:
            if self._mask is None:
                self._mask = torch.empty(self._chunk_rows, dtype=torch.bool, device=self.device)
            self._mask[waiting] = True if mask is None else mask
        self._filled += rows
        if self._filled == self._chunk_rows:
            self._flush()

    def _flush(self) -> None:
        """Takes the rows that wait in the buffers."""
        if self._filled == 0:
            return
        waiting = slice(self._filled)
        mask = None if self._mask is None else self._mask[waiting]
        with torch.inference_mode(False), torch.no_grad(), without_autocast(self.device.type):
            self._take([self._buffer(site)[waiting] for site in self._sites()], mask)
        self._filled = 0

    def _take(self, blocks: list[Tensor], mask: Tensor | None) -> None:
        """Adds one chunk of raw rows to all sums; a site is centred where it is first needed."""
        # before a row has counted there is no mean to centre about: only then a GPU is waited for
        if self._xs[0].shift is None and mask is not None and not mask.any():
            return
        rows = blocks[0].shape[0]
        self._count += rows if mask is None else mask.sum()
        centred: dict[int, Tensor] = {}

        def centre(index: int) -> Tensor:
            if index not in centred:
                site, block = self._sites()[index], blocks[index]
                if site.shift is None:
                    site.shift = _mean(block, mask, self._work_dtype)
                centred[index] = self._buffer(site)[:rows]
                correlation_centre(
                    block,
                    site.shift,
                    centred[index],
                    site.sums,
                    mask=mask,
                    backend=self._backend,
                )
                if site.gram is not None:
                    correlation_gram(centred[index], site.gram, backend=self._backend)
            return centred[index]

        for (a, b), product in self._products.items():
            x, y = centre(a), centre(len(self._xs) + b)
            correlation_product(x, y, product, backend=self._backend)
        for index in range(len(blocks)):
            centre(index)

    def _buffer(self, site: "_Site") -> Tensor:
        if site.buffer is None:
            site.buffer = torch.empty(
                self._chunk_rows, site.width, dtype=self._work_dtype, device=self.device
            )
        return site.buffer


@dataclasses.dataclass
class _Site:
    """Sums of one site about its shift, the mean of its first chunk.

    Attributes:
        name: as the caller of `update` knows it, "xs[0]".
        sums: [2, D], of the centred features and of their squares.
        gram: [D, D] or None; filled above the diagonal.
        shift: [D]; None until rows have come.
        buffer: [chunk_rows, D], raw rows that wait, then centred ones while they are multiplied.
    """

    name: str
    sums: Tensor
    gram: Tensor | None
    shift: Tensor | None = None
    buffer: Tensor | None = None

    @property
    def width(self) -> int:
        return self.sums.shape[1]

    def check_finite(self) -> None:
        bad = ~self.sums[0].isfinite()
        if bad.any():
            first, number = int(bad.nonzero()[0]), int(bad.sum())
            raise ValueError(
                f"{self.name}: expected finite features in rows that count, got NaN or infinity in "
                f"feature {first}" + (f" and {number - 1} more" if number > 1 else "")
            )
        for products in (self.sums[1], self.gram):
            if products is not None and not products.isfinite().all():
                raise ValueError(_too_large(self.name))

    def moments(self, count: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Mean and variance [D], covariance [D, D] or None."""
        offset, square = self.sums / count
        var = square - offset.square()
        # the mean of equal fp64 numbers may be the number next to them
        assert self.shift is not None  # rows have come: `count` divides
        rounding = 4 * torch.finfo(torch.float64).eps * self.shift
        var = var.masked_fill(var <= rounding.square(), 0.0)
        if self.gram is None:
            return self.shift + offset, var, None
        cov = (self.symmetric_gram() / count).sub_(torch.outer(offset, offset))
        cov.diagonal().copy_(var)
        return self.shift + offset, var, cov

    def symmetric_gram(self) -> Tensor:
        """`gram` with its lower triangle filled."""
        gram = self.gram
        assert gram is not None  # who asks has seen it
        upper = gram.triu(1)
        return gram.triu_().add_(upper.t())

    def shift_or_zero(self) -> Tensor:
        return torch.zeros_like(self.sums[0]) if self.shift is None else self.shift

    def merge(self, other: "_Site", count: Tensor) -> None:
        if self.gram is not None:
            _merge_products(self.gram, other.symmetric_gram(), self, self, other, other, count)
        if other.shift is None:
            return
        assert self.shift is not None  # of all merged sites, which the caller has centred
        step = other.shift - self.shift
        self.sums[1] += other.sums[1] + 2 * step * other.sums[0] + count * step.square()
        self.sums[0] += other.sums[0] + count * step


def _merge_products(
    product: Tensor, more: Tensor, x: _Site, y: _Site, more_x: _Site, more_y: _Site, count: Tensor
) -> None:
    """product += more, which was summed about the shifts of more_x and more_y.

    sum (u + p)(v + q) = sum u v + p sum v + q sum u + n p q, with p and q the steps between shifts.
    """
    if more_x.shift is None or more_y.shift is None or x.shift is None or y.shift is None:
        return  # no row of `more` has counted
    step_x, step_y = more_x.shift - x.shift, more_y.shift - y.shift
    product += more
    product += torch.outer(step_x, more_y.sums[0] + count * step_y)
    product += torch.outer(more_x.sums[0], step_y)


def _too_large(name: str) -> str:
    return f"{name}: expected products within float32, got larger ones; pass features as float64"


def _mean(rows: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """[D] fp64, of values that `dtype` holds."""
    rows = rows.to(dtype).double()
    if mask is None:
        mean = rows.mean(0)
    else:
        mean = rows.masked_fill(~mask[:, None], 0.0).sum(0) / mask.sum()
    return mean.to(dtype).double()


def _inverse_std(var: Tensor) -> Tensor:
    return torch.where(var > 0, var, 1.0).rsqrt() * (var > 0)


def _checked_widths(name: str, widths: Sequence[int]) -> tuple[int, ...]:
    widths = tuple(int(width) for width in widths)
    if not widths or min(widths) < 1:
        raise ValueError(f"{name}: expected one positive width a site, got {widths}")
    return widths


def _checked_pairs(
    pairs: Sequence[tuple[int, int]], xs: int, ys: int
) -> tuple[tuple[int, int], ...]:
    pairs = tuple((int(a), int(b)) for a, b in pairs)
    for a, b in pairs:
        if not (0 <= a < xs and 0 <= b < ys):
            raise ValueError(
                f"pairs: expected (a, b) with a in [0, {xs}) and b in [0, {ys}), got {(a, b)}"
            )
    if len(set(pairs)) != len(pairs):
        raise ValueError(f"pairs: expected each pair once, got {pairs}")
    return pairs


def _entry(state: Mapping[str, Tensor], name: str, shape: Sequence[int] | None) -> Tensor:
    if name not in state:
        raise ValueError(f"state: expected an entry {name!r}, got none")
    if shape is not None and tuple(state[name].shape) != tuple(shape):
        raise ValueError(
            f"state: expected shape {tuple(shape)} for {name!r}, got {tuple(state[name].shape)}"
        )
    return state[name]

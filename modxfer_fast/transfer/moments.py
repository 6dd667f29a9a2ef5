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

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from modxfer_fast.kernels.common import check_float, check_row_tensor, without_autocast
from modxfer_fast.kernels.correlation import op

CHUNK_ROWS = op.MAX_ROWS


@dataclass(frozen=True)
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

    def on_cpu(self) -> "Moments":
        """The same numbers on the host, where assignments and decompositions run."""
        parts = vars(self).items()
        moved: dict[str, Any] = {name: x.cpu() for name, x in parts if isinstance(x, Tensor)}
        return replace(self, **moved)

    def swapped(self) -> "Moments":
        """x and y exchanged."""
        return replace(
            self,
            mean_x=self.mean_y,
            mean_y=self.mean_x,
            var_x=self.var_y,
            var_y=self.var_x,
            cov_xx=self.cov_yy,
            cov_yy=self.cov_xx,
            cov_xy=self.cov_xy.T,
        )

    def block(self, x: slice, y: slice) -> "Moments":
        """The features x of the one side and y of the other."""
        return replace(
            self,
            mean_x=self.mean_x[x],
            mean_y=self.mean_y[y],
            var_x=self.var_x[x],
            var_y=self.var_y[y],
            cov_xx=_if_there(lambda cov: cov[x, x], self.cov_xx),
            cov_yy=_if_there(lambda cov: cov[y, y], self.cov_yy),
            cov_xy=self.cov_xy[x, y],
        )

    def about(self, x: Tensor, y: Tensor) -> "Moments":
        """Second moments about the points x [D_x] and y [D_y], not the means, which become 0."""
        dx, dy = self.mean_x - x, self.mean_y - y
        return replace(
            self,
            mean_x=torch.zeros_like(dx),
            mean_y=torch.zeros_like(dy),
            var_x=self.var_x + dx * dx,
            var_y=self.var_y + dy * dy,
            cov_xx=_if_there(lambda cov: cov + torch.outer(dx, dx), self.cov_xx),
            cov_yy=_if_there(lambda cov: cov + torch.outer(dy, dy), self.cov_yy),
            cov_xy=self.cov_xy + torch.outer(dx, dy),
        )

    def uncentred(self) -> "Moments":
        """Second moments about 0."""
        return self.about(torch.zeros_like(self.mean_x), torch.zeros_like(self.mean_y))

    def in_units(self, x: float, y: float) -> "Moments":
        """The features of each side divided by a unit."""
        return replace(
            self,
            mean_x=self.mean_x / x,
            mean_y=self.mean_y / y,
            var_x=self.var_x / x**2,
            var_y=self.var_y / y**2,
            cov_xx=_if_there(lambda cov: cov / x**2, self.cov_xx),
            cov_yy=_if_there(lambda cov: cov / y**2, self.cov_yy),
            cov_xy=self.cov_xy / (x * y),
        )


class StreamingMoments:
    """Accumulates what `Moments` of chosen pairs of sites need; order and cut of the rows are free.

    Args:
        x_widths, y_widths: features of each site.
        pairs: (a, b): site a of x with site b of y.
        gram_x, gram_y: whether the covariances within the x sites, and the y sites, are wanted.
        device: of the accumulators and of every tensor that `update` gets.
        backend: "triton", "cuda", "cpp" or "reference"; None takes the best available.
            "cuda" runs by name alone.
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
        self.pairs = tuple((int(a), int(b)) for a, b in pairs)
        xs, ys = len(self.x_widths), len(self.y_widths)
        for a, b in self.pairs:
            if not (0 <= a < xs and 0 <= b < ys):
                raise ValueError(
                    f"pairs: expected (a, b) with a in [0, {xs}) and b in [0, {ys}), got {(a, b)}"
                )
        if len(set(self.pairs)) != len(self.pairs):
            raise ValueError(f"pairs: expected each pair once, got {self.pairs}")
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
        self._filled = 0  # rows that wait in the buffers of the sites
        self._is_centred = False  # a row has counted, and the sites have their shifts
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
        mean_x, var_x, cov_xx = x.moments(count)
        mean_y, var_y, cov_yy = y.moments(count)
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
        sites = list(zip(self._sites(), other._sites(), strict=True))
        for mine, theirs in sites:
            if (mine.gram is None) != (theirs.gram is None):
                raise ValueError(f"other: expected Gram matrices where these are, at {mine.name}")
        self._flush()
        other._flush()
        if other._work_dtype == torch.float64:
            self._widen()
        if not other._is_centred:  # no row has counted there
            return
        if not self._is_centred:
            self._is_centred = True
            for mine, theirs in sites:
                mine.shift.copy_(theirs.shift)
        count, steps = other._count, [theirs.shift - mine.shift for mine, theirs in sites]

        def add(product: Tensor, more: Tensor, x: int, y: int) -> None:
            # sum (u + p)(v + q) = sum u v + p sum v + q sum u + n p q, with the steps p and q
            product += more
            product += torch.outer(steps[x], sites[y][1].sums[0] + count * steps[y])
            product += torch.outer(sites[x][1].sums[0], steps[y])

        for (a, b), product in self._products.items():
            add(product, other._products[a, b], a, len(self._xs) + b)
        for index, (mine, theirs) in enumerate(sites):
            if mine.gram is not None and theirs.gram is not None:
                theirs.fill_gram()
                add(mine.gram, theirs.gram, index, index)
            step = steps[index]
            mine.sums[1] += theirs.sums[1] + 2 * step * theirs.sums[0] + count * step.square()
            mine.sums[0] += theirs.sums[0] + count * step
        self._count += count

    def state_dict(self) -> dict[str, Tensor]:
        """All sums, without copying them: "count", "x.0.sums", "product.0.0", ..."""
        self._flush()
        for site in self._sites():
            site.fill_gram()
        return self._sums() | {
            "x_widths": torch.tensor(self.x_widths, dtype=torch.int64),
            "y_widths": torch.tensor(self.y_widths, dtype=torch.int64),
            "pairs": torch.tensor(self.pairs, dtype=torch.int64).reshape(-1, 2),
        }

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
        sizes = (_entry(state, name).tolist() for name in ("x_widths", "y_widths", "pairs"))
        new = cls(
            *sizes,
            gram_x="x.0.gram" in state,
            gram_y="y.0.gram" in state,
            device=device,
            backend=backend,
        )
        for name, sums in new._sums().items():
            sums.copy_(_entry(state, name, sums.shape))
        new._is_centred = int(state["count"]) > 0
        if any((site.shift != site.shift.float()).any() for site in new._sites()):
            new._widen()
        return new

    def _sums(self) -> dict[str, Tensor]:
        """Every accumulator by its name in `state_dict`."""
        named = {"count": self._count}
        for side, sites in (("x", self._xs), ("y", self._ys)):
            for index, site in enumerate(sites):
                for name in ("shift", "sums", "gram"):
                    if getattr(site, name) is not None:
                        named[f"{side}.{index}.{name}"] = getattr(site, name)
        return named | {f"product.{a}.{b}": part for (a, b), part in self._products.items()}

    def _make_sites(self, side: str, widths: tuple[int, ...], gram: bool) -> list["_Site"]:
        zeros = self._zeros
        return [
            _Site(f"{side}[{i}]", zeros(n), zeros(2, n), zeros(n, n) if gram else None)
            for i, n in enumerate(widths)
        ]

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
        """Adds one chunk of raw rows to all sums; its rows are centred where first needed."""
        sites = self._sites()
        if not self._is_centred:
            # before a row has counted there is no mean: only then a GPU is waited for
            if mask is not None and not mask.any():
                return
            self._is_centred = True
            for site, block in zip(sites, blocks, strict=True):
                site.shift.copy_(_mean(block, mask, self._work_dtype))
        rows = blocks[0].shape[0]
        self._count += rows if mask is None else mask.sum()
        centred: dict[int, Tensor] = {}

        def centre(index: int) -> Tensor:
            if index not in centred:
                site, out = sites[index], self._buffer(sites[index])[:rows]
                op.correlation_centre(
                    blocks[index], site.shift, out, site.sums, mask=mask, backend=self._backend
                )
                if site.gram is not None:
                    op.correlation_gram(out, site.gram, backend=self._backend)
                centred[index] = out
            return centred[index]

        for (a, b), product in self._products.items():
            x, y = centre(a), centre(len(self._xs) + b)
            op.correlation_product(x, y, product, backend=self._backend)
        for index in range(len(blocks)):
            centre(index)

    def _buffer(self, site: "_Site") -> Tensor:
        if site.buffer is None:
            site.buffer = torch.empty(
                self._chunk_rows, site.width, dtype=self._work_dtype, device=self.device
            )
        return site.buffer


@dataclass
class _Site:
    """Sums of one site about its shift, the mean of its first chunk.

    Attributes:
        name: as the caller of `update` knows it, "xs[0]".
        shift: [D]; 0 until rows have come.
        sums: [2, D], of the centred features and of their squares.
        gram: [D, D] or None; filled above the diagonal.
        buffer: [chunk_rows, D], raw rows that wait, then centred ones while they are multiplied.
    """

    name: str
    shift: Tensor
    sums: Tensor
    gram: Tensor | None
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
        rounding = 4 * torch.finfo(torch.float64).eps * self.shift
        var = var.masked_fill(var <= rounding.square(), 0.0)
        cov = None
        if self.gram is not None:
            self.fill_gram()
            cov = (self.gram / count).sub_(torch.outer(offset, offset))
            cov.diagonal().copy_(var)
        return self.shift + offset, var, cov

    def fill_gram(self) -> None:
        """Copies what `gram` has above its diagonal below."""
        if self.gram is not None:
            upper = self.gram.triu(1)
            self.gram.triu_().add_(upper.t())


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


def _if_there(change: Callable[[Tensor], Tensor], cov: Tensor | None) -> Tensor | None:
    return None if cov is None else change(cov)


def _inverse_std(var: Tensor) -> Tensor:
    return torch.where(var > 0, var, 1.0).rsqrt() * (var > 0)


def _checked_widths(name: str, widths: Sequence[int]) -> tuple[int, ...]:
    widths = tuple(int(width) for width in widths)
    if not widths or min(widths) < 1:
        raise ValueError(f"{name}: expected one positive width a site, got {widths}")
    return widths


def _entry(state: Mapping[str, Tensor], name: str, shape: Sequence[int] | None = None) -> Tensor:
    if name not in state:
        raise ValueError(f"state: expected an entry {name!r}, got none")
    if shape is not None and tuple(state[name].shape) != tuple(shape):
        raise ValueError(
            f"state: expected shape {tuple(shape)} for {name!r}, got {tuple(state[name].shape)}"
        )
    return state[name]

"""The numbers that a GPU has to reach, beside those that a run measured.

python -m benchmarks.gates FILE.json [FILE.csv ...]
"""

import argparse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import results
from benchmarks.results import Row


@dataclass(frozen=True)
class Gate:
    """One limit.

    Attributes:
        problem: what the row's problem must hold.
        column: of our row; with a `peer`, the peer's value is divided by ours.
        limit: the largest value allowed, or the smallest where there is a `peer`.
        impl: name of our row.
        peer: how the name of the peer's row begins and ends.
    """

    room: str
    problem: Mapping[str, int | float | str]
    column: str
    limit: float
    impl: str = "ours triton"
    peer: tuple[str, str] | None = None

    def line(self, rows: Iterable[Row]) -> str:
        """The gate, what was measured, and whether it is met; or why that is not known."""
        problem = " ".join(f"{name}={value}" for name, value in self.problem.items())
        what, relation = self.column, "<="
        if self.peer:
            what, relation = f"{self.column} of {' '.join(self.peer).strip()} over ours", ">="
        gate = f"{self.room} {problem}, {self.impl}: {what} {relation} {self.limit:g}"
        here = [row for row in rows if row.room == self.room and self._is_of(row)]
        ours = _find(here, self.impl, "")
        peer = _find(here, *self.peer) if self.peer else None
        for name, row in ((self.impl, ours), (" ".join(self.peer or ()), peer)):
            if row is None and name:
                return f"open    {gate}; no row of {name.strip()}"
            if row is not None and getattr(row, self.column) is None:
                return f"open    {gate}; {row.impl}: {row.check}"
        value = getattr(ours, self.column)
        met = value <= self.limit
        if peer:
            value = getattr(peer, self.column) / value
            met = value >= self.limit
        mark = "met   " if met and not ours.is_over_budget else "MISSED"
        note = f", {ours.check}" if ours.is_over_budget else ""
        return f"{mark}  {gate}; measured {value:.4g}{note}"

    def _is_of(self, row: Row) -> bool:
        return all(row.problem.get(name) == value for name, value in self.problem.items())


def _find(rows: Iterable[Row], start: str, end: str) -> Row | None:
    exact = [row for row in rows if not end and row.impl == start]
    near = (row for row in rows if row.impl.startswith(start) and row.impl.endswith(end))
    return exact[0] if exact else next(near, None)


@dataclass(frozen=True)
class _Problem:
    """Gates of one room on one problem."""

    room: str
    sizes: Mapping[str, int | float | str] = field(default_factory=dict)

    def at_most(self, column: str, limit: float, impl: str = "ours triton") -> Gate:
        return Gate(self.room, self.sizes, column, limit, impl)

    def faster_than(self, *peer: str, by: float, column="time_ms", impl="ours triton") -> Gate:
        return Gate(self.room, self.sizes, column, by, impl, (*peer, "")[:2])


_HEAD = {"D_s": 4096, "D_t": 4096, "V": 128256}
_KL = _Problem("linear_kd_loss", {"N": 8192, **_HEAD, "divergence": "forward_kl"})
_JSD = _Problem("linear_kd_loss", {"N": 8192, **_HEAD, "divergence": "jsd"})
_FEW = _Problem("linear_kd_loss", {"N": 1024, **_HEAD, "divergence": "forward_kl"})
_SMALL = _Problem(
    "linear_kd_loss", {"N": 8192, "D_s": 2048, "D_t": 4096, "divergence": "forward_kl"}
)
_LORA = _Problem("lora_linear", {"M": 8192, "K": 4096, "N": 4096, "R": 16, "dropout": 0.1})
_LAYER = _Problem("lora_block", {"H": 4096, "targets": "all-linear"})
_PROJECTION = _Problem("projection_loss", {"N": 8192, "D_s": 2048, "D_t": 4096, "loss": "mse"})
_LOGITS = _Problem("kd_loss", {"N": 8192, "V": 151936, "divergence": "forward_kl"})
_FROZEN, _WIDE = "ours triton, frozen head", "ours triton, fp32 adapters"
WORKSPACE_MIB = 512

GATES = (
    _KL.at_most("time_ms", 49.0),
    _KL.at_most("ratio_to_floor", 1.08),
    _KL.at_most("ratio_to_floor", 1.10, _FROZEN),
    _KL.at_most("peak_mib", 1.01 * WORKSPACE_MIB),
    _KL.faster_than("trl", by=1.6),
    _KL.faster_than("liger", by=2.0),
    _JSD.at_most("time_ms", 51.0),
    _JSD.at_most("ratio_to_floor", 1.08),
    _JSD.faster_than("trl", by=2.2),
    _JSD.faster_than("liger", by=2.0),
    _FEW.at_most("time_ms", 6.6),
    _SMALL.at_most("ratio_to_floor", 1.08),
    _LORA.at_most("ratio_to_floor", 1.085),
    _LORA.faster_than("peft", ", AMP", by=1.5, impl=_WIDE),
    _LORA.faster_than("peft", ", AMP", by=1 / 0.35, column="saved_mib", impl=_WIDE),
    _LAYER.at_most("ratio_to_floor", 1.035),
    _PROJECTION.at_most("ratio_to_floor", 1.10),
    _PROJECTION.faster_than("eager", by=1.2),
    _LOGITS.at_most("time_ms", 3.4),
    _Problem("correlation", {"products": "cross"}).at_most("ratio_to_floor", 1.15),
)


def lines(rows: Sequence[Row]) -> list[str]:
    """Every gate of a room that the rows are of; none for rows of a CPU."""
    rows = [row for row in rows if row.device == "cuda"]
    rooms = {row.room for row in rows}
    return [gate.line(rows) for gate in GATES if gate.room in rooms]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gates", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    rows = [row for path in args.files for row in results.read(path)[1]]
    print("\n".join(lines(rows)) or "no row was measured on a GPU: no gate applies")


if __name__ == "__main__":
    main()

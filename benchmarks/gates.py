"""The numbers that a GPU has to reach, beside those that a run measured.

python -m benchmarks.gates FILE.json [FILE.csv ...]
"""

import argparse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
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
        peer: how the name of the peer's row, which has its version in it, begins and ends.
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
        relation = f" of {' '.join(self.peer).strip()} over ours >=" if self.peer else " <="
        gate = f"{self.room} {problem}, {self.impl}: {self.column}{relation} {self.limit:g}"
        here = [
            row
            for row in rows
            if row.room == self.room and self.problem.items() <= row.problem.items()
        ]
        ours = next((row for row in here if row.impl == self.impl), None)
        found = {self.impl: ours}
        if self.peer:
            start, end = self.peer
            names = (row for row in here if row.impl.startswith(start) and row.impl.endswith(end))
            found[" ".join(self.peer).strip()] = next(names, None)
        values = []
        for name, row in found.items():
            if row is None:
                return f"open    {gate}; no row of {name}"
            value = getattr(row, self.column)
            if value is None:
                return f"open    {gate}; {row.impl}: {row.check}"
            values.append(value)
        assert ours is not None
        value = values[1] / values[0] if self.peer else values[0]
        met = value >= self.limit if self.peer else value <= self.limit
        mark = "met   " if met and not ours.is_over_budget else "MISSED"
        note = f", {ours.check}" if ours.is_over_budget else ""
        return f"{mark}  {gate}; measured {value:.4g}{note}"


_HEAD = {"D_s": 4096, "D_t": 4096, "V": 128256}
_KL = "linear_kd_loss", {"N": 8192, **_HEAD, "divergence": "forward_kl"}
_JSD = "linear_kd_loss", {"N": 8192, **_HEAD, "divergence": "jsd"}
_FEW = "linear_kd_loss", {"N": 1024, **_HEAD, "divergence": "forward_kl"}
_SMALL = "linear_kd_loss", {"N": 8192, "D_s": 2048, "D_t": 4096, "divergence": "forward_kl"}
_LORA = "lora_linear", {"M": 8192, "K": 4096, "N": 4096, "R": 16, "dropout": 0.1}
_LAYER = "lora_block", {"H": 4096, "targets": "all-linear"}
_PROJECTION = "projection_loss", {"N": 8192, "D_s": 2048, "D_t": 4096, "loss": "mse"}
_LOGITS = "kd_loss", {"N": 8192, "V": 151936, "divergence": "forward_kl"}
_CORRELATION = "correlation", {"products": "cross"}
_FROZEN, _WIDE = "ours triton, frozen head", "ours triton, fp32 adapters"
_TRL, _LIGER, _EAGER, _PEFT_AMP = ("trl", ""), ("liger", ""), ("eager", ""), ("peft", ", AMP")
# what linear_kd_loss says of its memory: logits of 1024 rows, and bf16 dlogits of all
PEAK_MIB = (8 * 1024 + 2 * 8192) * 128256 / 2**20

GATES = (
    Gate(*_KL, "time_ms", 49.0),
    Gate(*_KL, "ratio_to_floor", 1.08),
    Gate(*_KL, "ratio_to_floor", 1.10, _FROZEN),
    Gate(*_KL, "peak_mib", 1.01 * PEAK_MIB),
    Gate(*_KL, "time_ms", 1.6, peer=_TRL),
    Gate(*_KL, "time_ms", 2.0, peer=_LIGER),
    Gate(*_JSD, "time_ms", 51.0),
    Gate(*_JSD, "ratio_to_floor", 1.08),
    Gate(*_JSD, "time_ms", 2.2, peer=_TRL),
    Gate(*_JSD, "time_ms", 2.0, peer=_LIGER),
    Gate(*_FEW, "time_ms", 6.6),
    Gate(*_SMALL, "ratio_to_floor", 1.08),
    Gate(*_LORA, "ratio_to_floor", 1.085),
    Gate(*_LORA, "time_ms", 1.5, _WIDE, peer=_PEFT_AMP),
    Gate(*_LORA, "saved_mib", 1 / 0.35, _WIDE, peer=_PEFT_AMP),
    Gate(*_LAYER, "ratio_to_floor", 1.035),
    Gate(*_PROJECTION, "ratio_to_floor", 1.10),
    Gate(*_PROJECTION, "time_ms", 1.2, peer=_EAGER),
    Gate(*_LOGITS, "time_ms", 3.4),
    Gate(*_CORRELATION, "ratio_to_floor", 1.15),
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

"""Benchmarks of every room against its peers and its floor: checked first, timed second.

    modxfer bench ROOM [--device cpu|cuda] [--shape NAME] [--json FILE]
    python -m benchmarks.plot FILE.json --output FILE.png

bench_<room>.py   who takes part, the floors     peers.py        Liger and TRL, both optional
harness.py        check, measure, make rows      dense.py        plain PyTorch, as users write it
timing.py         interleaved rounds             memory.py       peak of one step
inputs.py         close student, fp64 truth      shapes.py       named sizes of real models
results.py        columns, JSON and CSV          plot.py         figures, from those files only

Not part of the wheel: run from a checkout.
"""

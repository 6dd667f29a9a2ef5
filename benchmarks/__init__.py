"""Benchmarks of every room against its peers and its floor: checked, then timed, then written.

    modxfer bench ROOM [--device cpu|cuda] [--shape NAME] [--variant NAME ...] [--json FILE]
    python -m benchmarks.plot FILE.json --output FILE.png
    benchmarks/gpu_suite.sh first|tables|full

bench_<room>.py   shapes, who takes part, floors  rooms.py        what a room declares
harness.py        check, count, time, make rows   candidates.py   our backends, one training step
inputs.py         close student, fp64 truth       shapes.py       named sizes of the KD rooms
peers.py          Liger, TRL and PEFT, optional   dense.py        plain PyTorch, as users write it
unsloth_style.py  LoRA by addmm, as libraries do  gates.py        the numbers a GPU has to reach
results.py        columns, JSON and CSV           plot.py         figures, from those files only
gpu_tables.py     all tables of a GPU in one run  console.py      progress and tables

Clock, memory and roof are `modxfer_fast.measure`. Not part of the wheel: run from a checkout.
"""

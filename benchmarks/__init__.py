"""Benchmarks of every room against its peers and its floor: checked, then timed, then written.

    modxfer bench ROOM [--device cpu|cuda] [--shape NAME] [--variant NAME ...] [--json FILE]
    python -m benchmarks.plot FILE.json --output FILE.png
    benchmarks/gpu_suite.sh first|tables|full

bench_<room>.py   sizes, who takes part, floors   rooms.py        what a room declares, and how
harness.py        check, count, time, make rows   peers.py        Liger, TRL and PEFT, optional
kd.py             what the KD rooms share         lora.py         what the LoRA rooms share
results.py        columns, JSON and CSV           gates.py        the numbers a GPU has to reach
console.py        progress and tables             plot.py         figures, from those files only
gpu_tables.py     all tables of a GPU in one run

Clock, memory and roof are `modxfer_fast.measure`. Not part of the wheel: run from a checkout.
"""

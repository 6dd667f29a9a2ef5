"""Time, memory and operations of a step, on "cpu" or "cuda", and the machine it was measured on.

Needs torch only: benchmarks use it where the engine's packages are absent.

timing.py    rounds in turn, by the device's clock    memory.py       peak of one step
counting.py  saved tensors, launches, products        tracing.py      the profiler's events
roofline.py  roof of the machine, measured            environment.py  names and versions
"""

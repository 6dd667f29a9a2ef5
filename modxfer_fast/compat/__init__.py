"""Doors for other projects: their names and conventions, computed by our ops.

`compat.liger` has the distillation losses of Liger-Kernel, `compat.trl` those of TRL and what puts
them into its trainers. Each keeps the arguments, defaults, reductions and return types of its peer,
also where ours differ.
"""

"""The rooms: one folder per operation, one file per backend.

`kernels` depends on torch and on nothing else of this project. It is imported as
`modxfer_fast.kernels`; the bare name `kernels` belongs to another library.
"""

"""The kernels of `lora_linear` as they are launched in training."""

import dataclasses
import itertools

import torch

from modxfer_fast.kernels.lora_linear import LoraTarget
from modxfer_fast.kernels.lora_linear.dropout import num_words
from modxfer_fast.kernels.lora_linear.triton_backward import da, ds_db, dx
from modxfer_fast.kernels.lora_linear.triton_expand import expand
from modxfer_fast.kernels.lora_linear.triton_reduce import reduce
from modxfer_fast.kernels.lora_linear.triton_shrink import shrink

FUNCTIONS = ("shrink", "expand", "ds_db", "dx", "da")
# widths of the targets that share an input: o or down; gate and up; q, k and v
GROUPS = {"one": (4096,), "gate-up": (14336, 14336), "qkv": (4096, 1024, 1024)}
# (x, adapters)
DTYPES = {
    "bf16": (torch.bfloat16, torch.bfloat16),
    "bf16-fp32": (torch.bfloat16, torch.float32),
    "fp16": (torch.float16, torch.float16),
    "fp32": (torch.float32, torch.float32),
}
ONE_STEP = 2.0**-16  # of dropout: a threshold of 1, which Triton makes a constant


@dataclasses.dataclass(frozen=True)
class Case:
    """One kernel of `lora_linear` and the inputs it is launched for."""

    function: str
    group: str
    dtypes: str
    rank: int = 16
    dropout: float = 0.1
    rows: int = 8192
    width: int = 4096
    has_weight: bool = True
    has_residual: bool = False
    projected: int = 0  # columns of a projection of the output

    @property
    def most_registers(self) -> int:
        """One program of 256 threads a multiprocessor, as large tiles of products have it."""
        return 255

    def launch(self) -> None:
        dtype, adapter_dtype = DTYPES[self.dtypes]

        def empty(*shape, dtype=dtype):
            return torch.empty(*shape, dtype=dtype, device="meta")

        targets = [
            LoraTarget(
                empty(n, self.width) if self.has_weight else None,
                empty(self.rank, self.width, dtype=adapter_dtype),
                empty(n, self.rank, dtype=adapter_dtype),
                2.0,
                dropout=self.dropout,
            )
            for n in GROUPS[self.group]
        ]
        needs = [True] * len(targets)
        x = empty(self.rows, self.width)
        dys = [empty(self.rows, target.lora_b.shape[0]) for target in targets]
        s = empty(self.rows, len(targets) * self.rank, dtype=adapter_dtype)
        ds = [empty(self.rows, self.rank, dtype=adapter_dtype) for _ in targets]
        masks = [
            empty(self.rows, 4 * num_words(self.width), dtype=torch.uint8) if self.dropout else None
            for _ in targets
        ]
        if self.function == "shrink":
            shrink(x, targets, empty(1, dtype=torch.int64))
        elif self.function == "expand":
            residual = empty(*dys[0].shape) if self.has_residual else None
            p = empty(self.projected, dys[0].shape[1]) if self.projected else None
            expand(x, targets, s, residual, p)
        elif self.function == "ds_db":
            ds_db(dys, targets, s, needs, needs)
        elif self.function == "dx":
            dx(dys, targets, ds, masks)
        elif self.function == "da":
            da(x, targets, ds, masks, needs)
        else:
            reduce([empty(16, *d.shape, dtype=torch.float32) for d in ds], ds)


def all_cases() -> list[Case]:
    """Groups and dtypes, then ranks, sizes and inputs that get another launch."""
    cases = [Case(*parts) for parts in itertools.product(FUNCTIONS, GROUPS, DTYPES)]
    for function, group in itertools.product(FUNCTIONS, GROUPS):
        case = Case(function, group, "bf16")
        cases += [dataclasses.replace(case, rank=rank) for rank in (8, 64, 256)]
        cases += [dataclasses.replace(case, rows=rows) for rows in (100, 2048)]
        cases += [
            dataclasses.replace(case, dropout=0.0),
            dataclasses.replace(case, dropout=ONE_STEP),
            dataclasses.replace(case, width=1001),
            dataclasses.replace(case, has_weight=False),
        ]
    for dtypes, ranks in itertools.product(("bf16", "bf16-fp32", "fp16"), (16, 32)):
        cases.append(Case("expand", "one", dtypes, has_residual=True, projected=ranks))
    cases += [Case("expand", "one", dtypes, has_residual=True) for dtypes in DTYPES]
    cases += [Case("expand", "one", "bf16", rows=rows, projected=16) for rows in (100, 2048)]
    return [*cases, Case("reduce", "qkv", "bf16")]


def core_cases() -> list[Case]:
    """Every kernel, masks of several targets where they meet, fp32 adapters of rank 64, and the
    least dropout."""
    cases = [Case(function, "qkv", "bf16") for function in ("shrink", "dx", "da", "reduce")]
    cases += [Case(function, "gate-up", "bf16") for function in ("expand", "ds_db")]
    cases += [Case(function, "one", "bf16-fp32", rank=64) for function in ("expand", "dx")]
    cases.append(Case("shrink", "one", "bf16", dropout=ONE_STEP))
    cases.append(Case("expand", "one", "bf16", has_residual=True, projected=32))
    return cases

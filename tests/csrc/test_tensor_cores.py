"""The emulator's products of a warp: each element where PTX says that it is.

Fragments as in the PTX ISA, "Matrix Fragments for mma.m16n8k16" and "for mma.m16n8k8": element i of
a lane, whose group is lane / 4 and whose place in it is lane % 4.
"""

import itertools
from ctypes import c_char_p, c_int, c_void_p

import numpy as np
import pytest
import torch

from tests.emulated import library

# name: number in the driver, dtype of the elements, depth of the product
TYPES = {"bf16": (0, torch.bfloat16, 16), "f16": (1, torch.float16, 16), "tf32": (2, None, 8)}


def place_in_a(lane: int, i: int, depth: int) -> tuple[int, int]:
    """Row and column of element i of a [16, depth]."""
    group, place = divmod(lane, 4)
    if depth == 8:
        return group + (8 if i in (1, 3) else 0), place + (4 if i >= 2 else 0)
    row = group if i in (0, 1, 4, 5) else group + 8
    return row, place * 2 + (i & 1) + (8 if i >= 4 else 0)


def place_in_b(lane: int, i: int, depth: int) -> tuple[int, int]:
    """Row and column of element i of b [depth, 8]."""
    group, place = divmod(lane, 4)
    if depth == 8:
        return place + 4 * i, group
    return place * 2 + (i & 1) + (8 if i >= 2 else 0), group


def place_in_c(lane: int, i: int) -> tuple[int, int]:
    """Row and column of element i of c [16, 8]."""
    group, place = divmod(lane, 4)
    return group if i < 2 else group + 8, place * 2 + (i & 1)


def fragments(matrix: torch.Tensor, place, count: int) -> torch.Tensor:
    """[32, count]: what each lane holds."""
    found = [matrix[place(lane, i)] for lane, i in itertools.product(range(32), range(count))]
    return torch.stack(found).reshape(32, count).contiguous()


def call(name: str, *args) -> None:
    function = getattr(library("emulated_tensor_cores.cpp", checked=False), name)
    function.restype = c_char_p
    function.argtypes = [c_int if isinstance(one, int) else c_void_p for one in args]
    fault = function(*(one if isinstance(one, int) else one.data_ptr() for one in args))
    assert not fault, fault.decode()


@pytest.mark.parametrize("name", TYPES)
def test_each_element_is_in_its_place(name):
    number, dtype, depth = TYPES[name]
    generator = torch.Generator().manual_seed(0)
    # of few bits, so that sums are exact and an element in another place is seen
    a, b, c = (
        torch.randint(-64, 64, shape, generator=generator).float()
        for shape in ((16, depth), (depth, 8), (16, 8))
    )
    per_lane = depth // 2
    left = fragments(a, lambda lane, i: place_in_a(lane, i, depth), per_lane)
    right = fragments(b, lambda lane, i: place_in_b(lane, i, depth), per_lane // 2)
    sums = fragments(c, place_in_c, 4)
    call("emulated_multiply_add", number, left.to(dtype), right.to(dtype), sums)
    assert torch.equal(sums, fragments(a @ b + c, place_in_c, 4))


def test_tf32_is_the_nearest_number_of_eleven_bits():
    x = torch.randn(32, generator=torch.Generator().manual_seed(0))
    x[:4] = torch.tensor([float("inf"), float("nan"), 0.0, 1.0 + 2.0**-11])
    rounded = x.clone()
    call("emulated_to_tf32", rounded)
    mantissa, exponent = np.frexp(x.numpy()[4:])
    nearest = np.ldexp(np.round(mantissa * 2.0**11), exponent - 11)
    assert np.array_equal(rounded.numpy()[4:], nearest)
    assert rounded[0] == float("inf")
    assert rounded[1].isnan()
    assert rounded[2] == 0.0
    assert rounded[3] == 1.0 + 2.0**-10  # a half goes away from zero

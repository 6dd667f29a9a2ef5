"""The roof of this machine."""

import torch

from modxfer_fast.measure import roofline


def test_roof_is_what_a_copy_and_a_product_reach():
    roof = roofline.measure_roof("cpu", torch.float32, copy_bytes=1 << 20, matmul_width=64)
    assert 1e8 < roof.bytes_per_s < 1e13
    assert 1e7 < roof.flops_per_s < 1e14
    assert set(roof.described()) == {"copy", "matmul"}

"""The launch heuristic of the Triton row kernels, which needs neither Triton nor a GPU."""

import itertools

import pytest
import torch

from modxfer_fast.kernels.kd_loss.config import FEW_ROWS, row_config

DTYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("warp_size", [32, 64])
def test_launches_are_within_hardware_limits(warp_size):
    for vocab_size, rows, student, teacher in itertools.product(
        (1, 100, 2048, 2049, 32000, 262144), (1, FEW_ROWS, 8192), DTYPES, DTYPES
    ):
        config = row_config(vocab_size, rows, (student, teacher), warp_size)
        threads = config.num_warps * warp_size
        assert threads <= 1024
        assert config.block_v % config.vector == 0
        for number in (config.block_v, config.num_warps):
            assert number & (number - 1) == 0


def test_a_thread_loads_16_bytes_of_the_wider_dtype():
    assert row_config(32000, 4096, (torch.float32, torch.bfloat16)).vector == 4
    assert row_config(32000, 4096, (torch.bfloat16, torch.bfloat16)).vector == 8


def test_few_rows_get_wider_tiles():
    few, many = (row_config(32000, rows, DTYPES) for rows in (FEW_ROWS - 1, FEW_ROWS))
    assert few.num_warps == 2 * many.num_warps


def test_a_small_vocabulary_is_one_tile():
    assert row_config(1000, 4096, DTYPES).block_v == 1024

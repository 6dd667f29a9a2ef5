"""The CUDA rows of the KD loss in stages on the emulator, by the check of the other backends."""

import pytest
import torch

from modxfer_fast.kernels.common import KDSpec
from modxfer_fast.kernels.divergences import DIVERGENCES
from tests.emulated.kd_loss import Emulated
from tests.support.kd_biases import check_biases
from tests.support.kd_rows import close_rows
from tests.support.kd_stages import BENDS, HARD, SUM, check_stages

# blocks a row, each of which has some of its classes
CLUSTERS = [1, 4]


@pytest.mark.parametrize("cluster", CLUSTERS)
@pytest.mark.parametrize("divergence", [*DIVERGENCES, SUM], ids=str)
def test_each_stage(divergence, cluster):
    impl = Emulated(cluster=cluster, is_resident=False)
    check_stages(impl, divergence, 2.0)


OPTIONS = {
    "at temperature 1": {"temperature": 1.0},
    "temperatures": {"temperature": "tokens"},
    "hard terms": {"hard": HARD},
    "bent": {"bends": BENDS},
    "bf16": {"dtype": torch.bfloat16},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
@pytest.mark.parametrize(
    "divergence", ["forward_kl", "reverse_kl", "jsd", "renyi", "logits_cosine"]
)
def test_options(divergence, options):
    check_stages(Emulated(is_resident=False), divergence, **options)


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_biases(divergence):
    check_biases(Emulated(is_resident=False), "stages", divergence)


@pytest.mark.parametrize("cluster", CLUSTERS)
@pytest.mark.parametrize("divergence", ["jsd", "negative_log_acceptance", "logits_cosine"])
def test_no_race_and_the_same_bits_with_every_schedule(divergence, cluster):
    rows = close_rows(5, 700)
    logits = (rows.student, rows.teacher)
    spec = KDSpec(divergence, temperature=1.5, ce_weight=0.4).checked()
    found = []
    for seed in range(4):
        impl = Emulated(cluster, is_resident=False, seed=seed, checked=True)
        parts = impl.kd_loss_stats(*logits, rows.labels, spec, True)
        whole = [20.0, 1.0, 20.0, 1.1, 0.1, 0.6]
        sums = impl.kd_loss_sums(*logits, torch.tensor([whole]).repeat(5, 1), spec)
        if spec.record.whole is not None:
            whole = whole + [1.2, 0.9, 0.1][: spec.record.whole.num_numbers]
        stats = torch.tensor([whole]).repeat(5, 1)
        dlogits = torch.full_like(rows.student, torch.nan)
        impl.kd_loss_write(*logits, rows.labels, 700, rows.row_weights, stats, spec, dlogits)
        found.append((parts, sums, dlogits))
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))

"""A check of the row kernels in stages against those of the reference in fp64."""

from types import ModuleType

import torch

from modxfer_fast.kernels.common import KDSpec
from modxfer_fast.kernels.divergences import DivergenceOption
from modxfer_fast.kernels.kd_loss import reference
from modxfer_fast.testing.accuracy import assert_within_budget

N, V, CLASSES = 7, 150, 400
HARD = {"label_smoothing": 0.1, "z_loss_weight": 0.01}
SUM = {"forward_kl": 0.7, "jsd": 0.25, "total_variation": 2.0}
BENDS = {"student_softcap": 6.0, "teacher_logit_scale": 1.5}
# Of two rows, what `OfRow.value` may give behind D and the sum of u: of a function of sums a slope,
# which is 0 where S is far from 1, and log S.
OF_SUMS = [[0.0, -0.7], [1.2, -0.1]]
NUMBERS = {"logits_mse": [[0.005], [0.1]], "logits_cosine": [[60.0, 70.0, 0.4], [50.0, 40.0, 1.2]]}


def check_stages(
    impl: ModuleType,
    divergence: DivergenceOption,
    temperature: float | str = 1.0,
    *,
    dtype: torch.dtype = torch.float32,
    hard: dict[str, float] | None = None,
    bends: dict[str, float] | None = None,
) -> None:
    """All three functions of `impl` for some of the classes of rows.

    Args:
        temperature: a number, or "tokens" for one of each.
        dtype: of dlogits.
        hard, bends: options beside the cross entropy, and what a model does to its logits.
    """
    options = (hard or {}) | (bends or {})
    number = 1.0 if isinstance(temperature, str) else temperature
    given = KDSpec(divergence, temperature=number, ce_weight=0.5, **options).checked()
    own = torch.stack([torch.linspace(0.6, 3.0, N), torch.linspace(2.0, 0.5, N)], dim=-1)
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(N, V, generator=generator) for _ in range(2))
    # of one row all classes of this rank are excluded, of another some of both sides
    student[1], teacher[1] = -torch.inf, -torch.inf
    student[2, :40], teacher[2, :40] = -torch.inf, -torch.inf
    # on this rank, on another one, nowhere
    labels = torch.tensor([3, V, 100, V - 1, -1, V, 0])
    weights = torch.tensor([1.0, 0.5, 2.0, 1.0, 1.0, 0.0, 1.0])
    whole = {"max_s": 9.0, "logd_s": 2.0, "max_t": 8.5, "logd_t": 2.5, "u_sum": -0.7, "logd_1": 1.8}
    if temperature == 1.0:
        whole["logd_1"] = whole["logd_s"]
    stats = torch.tensor(list(whole.values())).repeat(N, 1)

    def run(kernels, wide, out):
        spec = given.of_rows(own.to(wide) if temperature == "tokens" else None)
        z_s, z_t = student.to(wide), teacher.to(wide)
        parts = kernels.kd_loss_stats(z_s, z_t, labels, spec, True)
        write = stats.to(wide)
        sums = kernels.kd_loss_sums(z_s, z_t, write, spec)
        if spec.record.whole is not None:
            numbers = torch.tensor(NUMBERS.get(spec.record.name, OF_SUMS)).repeat(4, 1)[:N]
            write = torch.cat([stats, numbers], dim=-1).to(wide)
        dlogits = torch.empty_like(z_s, dtype=out)
        row_weights = weights.to(wide)
        kernels.kd_loss_write(z_s, z_t, labels, CLASSES, row_weights, write, spec, dlogits)
        return parts, sums, dlogits

    got, plain, exact = (
        run(impl, torch.float32, dtype),
        run(reference, torch.float32, torch.float32),
        run(reference, torch.float64, torch.float64),
    )
    columns = list(range(got[0].shape[1]))
    if not hard:
        columns.remove(6)  # the mean of all logits, which label smoothing alone reads
    rows = [0, 2, 3, 4, 5, 6]
    for column in columns:
        one, other, truth = (part[0][rows, column] for part in (got, plain, exact))
        if column == 6:
            one, other, truth = (t[[0, 2, 3, 4, 5]] for t in (one, other, truth))
        assert_within_budget(one.float(), truth, other, f"stats {column}", 20.0)
    # a rank without a class that counts adds nothing
    assert (got[0][1, [1, 3]] == 0).all()
    assert (got[0][1, [0, 2]] < -1e37).all()
    for name, one, other, truth in zip(
        ("sums", "dlogits"), got[1:], plain[1:], exact[1:], strict=True
    ):
        one = one.float() if one.dtype == torch.float64 else one
        scale = 4 * truth.abs().max().item() + 1.0
        scale *= torch.finfo(torch.float32).eps / torch.finfo(one.dtype).eps
        assert_within_budget(one, truth, other.to(one.dtype), name, scale)

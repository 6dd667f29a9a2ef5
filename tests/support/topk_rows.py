"""Rows of logits whose K largest are wanted, and what is right for them, in fp64 and by hand."""

import math

import torch
from torch import Tensor

from modxfer_fast import TeacherTopK

INF = math.inf


def randn(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def hard_rows(classes: int) -> Tensor:
    """[11, V]: what a selection by bounds, buckets or keys may trip over."""
    index = torch.arange(classes)
    rows = 3.0 * randn(11, classes, seed=classes)
    rows[1] = index.float()  # largest last
    rows[2] = -index.float()
    rows[3] = 1.25  # all are equal
    rows[4] = rows[4].round().clamp(-3, 3)  # many are
    rows[5] = torch.where(index % 3 == 0, -0.0, 0.0)  # -0 is 0
    rows[6, index % 5 != 1] = -INF  # few are there
    rows[7] = -INF
    rows[7, classes // 2] = 3e38
    rows[8] = -3e38 * rows[8].abs().clamp(max=1.0)
    rows[9, 0] = 60.0  # sure of one
    rows[10] = 1e-40 * index  # subnormal
    return rows


def broken_rows(classes: int) -> Tensor:
    """[4, V], which have no softmax."""
    rows = randn(4, classes)
    rows[0, classes // 2] = math.nan
    rows[1, -1] = INF
    rows[2] = -INF
    rows[3, 0], rows[3, -1] = INF, math.nan
    return rows


def truth_of(
    raw: Tensor, k: int, scale: float = 1.0, cap: float | None = None, temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """ids [M, k] int32, log_probs [M, k], log_tail [M] of rows that have a softmax, in fp64.

    Sorted by Python; sums by `math.fsum`, which rounds once.
    """
    ids, log_probs, log_tails = [], [], []
    for row in raw.double().tolist():
        order = sorted(range(len(row)), key=lambda i: (-row[i], i))
        listed = [i for i in order[:k] if row[i] > -INF]
        bent = [scale * x if cap is None else cap * math.tanh(scale * x / cap) for x in row]
        z = [x if math.isinf(x) else b / temperature for x, b in zip(row, bent, strict=True)]
        top = max(z)
        lse = math.log(math.fsum(math.exp(x - top) for x in z))
        tail = math.fsum(math.exp(z[i] - top) for i in order[k:])
        missing = k - len(listed)
        ids.append([*listed, *[-1] * missing])
        log_probs.append([*[z[i] - top - lse for i in listed], *[-INF] * missing])
        log_tails.append(math.log(tail) - lse if tail > 0.0 else -INF)
    wide = torch.float64
    return (
        torch.tensor(ids, dtype=torch.int32),
        torch.tensor(log_probs, dtype=wide),
        torch.tensor(log_tails, dtype=wide),
    )


Found = TeacherTopK | tuple[Tensor, Tensor, Tensor]  # what a user or a row kernel gets


def fields(found: Found) -> tuple[Tensor, Tensor, Tensor]:
    if not isinstance(found, TeacherTopK):
        return found
    assert found.log_tail is not None
    return found.ids, found.log_probs, found.log_tail


def assert_finds(found: Found, raw: Tensor, k: int, scale=1.0, cap=None, temperature=1.0) -> None:
    """The ids exactly; log_probs and log_tail to the rounding of fp32 logits and sums."""
    ids, log_probs, log_tail = fields(found)
    of_ids, of_probs, of_tail = truth_of(raw, k, scale, cap, temperature)
    assert ids.dtype == torch.int32
    assert torch.equal(ids, of_ids)
    # logits as they are read, less the largest, and the logarithm of a sum of up to V
    tolerance = {"rtol": 1e-6, "atol": 2e-6}
    if cap is not None:  # whose tanh is rounded
        tolerance["atol"] += 4e-7 * cap / temperature
    torch.testing.assert_close(log_probs.double(), of_probs, **tolerance)
    # what is less than any normal fp32 number beside the largest counts for nothing
    least = -85.0
    torch.testing.assert_close(
        log_tail.double().clamp(min=least), of_tail.clamp(min=least), rtol=2e-6, atol=2e-6
    )


def assert_finds_large(found: Found, logits: Tensor, k: int) -> None:
    """As `assert_finds` of rows of numbers, by a stable sort in fp64."""
    ids, log_probs, log_tail = fields(found)
    log_p = logits.double().log_softmax(-1)
    order = logits.double().sort(dim=-1, descending=True, stable=True).indices
    assert torch.equal(ids.long(), order[:, :k])
    torch.testing.assert_close(log_probs.double(), log_p.gather(1, order[:, :k]), rtol=0, atol=5e-6)
    tail = log_p.gather(1, order[:, k:]).logsumexp(-1)
    torch.testing.assert_close(log_tail.double(), tail, rtol=0, atol=5e-6)


def assert_is_broken(found: Found, k: int) -> None:
    ids, log_probs, log_tail = fields(found)
    assert (ids == torch.arange(k)).all()
    assert log_probs.isnan().all()
    assert log_tail.isnan().all()

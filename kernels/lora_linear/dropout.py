"""The dropout mask of every backend: one bit an element, from a counter-based generator.

    element (m, k) of target t:  word w = k // 32,  draw q = k % 32 // 8,  half h = k % 8
    o = Philox4x32-7(key = seed, counter = (4 w + q, m, 0, t))      four 32-bit words, eight halves
    kept  <=>  (o[h // 2] >> 16 (h % 2)) & 0xffff  >=  threshold(dropout)

A bit depends on the seed and on its place alone, so that targets are independent, threads and tiles
need no order, and a recomputation that restores torch's generator draws the same mask.
Philox and its constants: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011;
seven rounds are the fewest they found to pass every test of BigCrush.
"""

import torch
from torch import Tensor

ROUNDS = 7
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_MASK_32 = 0xFFFFFFFF


def threshold(dropout: float) -> int:
    """A half-word below it is dropped: the probability in steps of 2^-16."""
    return round(dropout * 65536)


def keep_scale(dropout: float) -> float:
    """1 / (1 - dropout), what a kept element is multiplied by; 0 where nothing is kept."""
    return 0.0 if dropout >= 1.0 else 1.0 / (1.0 - dropout)


def draw_seed(device: torch.device) -> Tensor:
    """int64 scalar on the device, from torch's generator of that device; no synchronisation."""
    return torch.randint(2**63 - 1, (), dtype=torch.int64, device=device)


def num_words(width: int) -> int:
    return (width + 31) // 32


def dropout_bits(seed: Tensor, rows: int, width: int, dropouts: list[float]) -> Tensor:
    """[T, rows, ceil(width / 32)] int32: bit k % 32 of word k // 32 is 1 where element k is kept.

    Bits past `width` are unspecified, but equal in every backend.

    Args:
        seed: int64 scalar.
        dropouts: probability of each of the T targets.
    """
    device, words = seed.device, num_words(width)
    bits = torch.empty(len(dropouts), rows, words, dtype=torch.int32, device=device)
    key = (seed & _MASK_32, (seed >> 32) & _MASK_32)
    row = torch.arange(rows, device=device)[:, None]
    word = torch.arange(words, device=device)[None, :]
    for target, dropout in enumerate(dropouts):
        packed = torch.zeros(rows, words, dtype=torch.int64, device=device)
        for draw in range(4):
            counter = (4 * word + draw, row, torch.zeros_like(word), torch.full_like(word, target))
            for i, output in enumerate(_philox(counter, key)):
                for half in range(2):
                    kept = ((output >> (16 * half)) & 0xFFFF) >= threshold(dropout)
                    packed |= kept.long() << (8 * draw + 2 * i + half)
        # to the two's complement of 32 bits
        bits[target] = torch.where(packed > 0x7FFFFFFF, packed - 2**32, packed).int()
    return bits


def unpack(bits: Tensor, width: int) -> Tensor:
    """[..., ceil(width / 32)] words -> [..., width] bool, True where kept."""
    lanes = torch.arange(32, dtype=torch.int32, device=bits.device)
    return ((bits[..., None] >> lanes) & 1).flatten(-2)[..., :width].bool()


def _philox(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = key
    for _ in range(ROUNDS):
        high_0, low_0 = _multiply(c0, _MULTIPLIERS[0])
        high_2, low_2 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high_2 ^ c1 ^ k0, low_2, high_0 ^ c3 ^ k1, low_0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK_32, (k1 + _KEY_STEPS[1]) & _MASK_32
    return c0, c1, c2, c3


def _multiply(x: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 64-bit product, each part of which fits an int64."""
    low = factor * (x & 0xFFFF)
    high = factor * (x >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)

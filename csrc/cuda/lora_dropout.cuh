// Dropout masks of kernels/lora_linear/dropout.py: a lane draws those of eight elements, one byte
// of a mask, and reads them again. Torch-free.
#pragma once

#include "fragments.cuh"

#define MODXFER_INLINE MODXFER_DEVICE

namespace modxfer::cuda {

using vw = uint64_t;

MODXFER_DEVICE vw multiply_low(vw x, unsigned factor) {
  return device::multiply_wide(static_cast<uint32_t>(x), factor);
}

#include "modxfer/philox.h"

// A half-word of the draws below the threshold is dropped.
MODXFER_DEVICE Kept kept_of(const Draws& draws, uint32_t threshold) {
  Kept kept;
  const int limit = static_cast<int>(threshold);
  MODXFER_UNROLL
  for (int i = 0; i < 4; ++i) {
    const auto word = static_cast<uint32_t>(draws.words[i]);
    const int low = static_cast<int>(word & 0xFFFF), high = static_cast<int>(word >> 16);
    kept.pairs[i] = ~device::negative_halves(low - limit, high - limit);
  }
  return kept;
}

// Bit i of a byte is element i.
MODXFER_DEVICE Kept kept_of_byte(uint32_t byte) {
  Kept kept;
  MODXFER_UNROLL
  for (int i = 0; i < 4; ++i) {
    const uint32_t bits = byte >> 2 * i;
    kept.pairs[i] = ((bits | bits << 15) & 0x10001) * 0xFFFF;
  }
  return kept;
}

MODXFER_DEVICE uint32_t byte_of(const Kept& kept) {
  uint32_t even = 0, odd = 0;
  MODXFER_UNROLL
  for (int i = 0; i < 4; ++i) {
    even |= kept.pairs[i] & 1 << 2 * i;
    odd |= kept.pairs[i] >> 16 & 2 << 2 * i;
  }
  return even | odd;
}

// The word of the four bytes of a group of lanes, in each of them.
MODXFER_DEVICE uint32_t word_of(uint32_t byte) {
  uint32_t word = byte << 8 * (device::thread_index() % 4);
  word |= device::from_lane_xor(word, 1);
  return word | device::from_lane_xor(word, 2);
}

}  // namespace modxfer::cuda

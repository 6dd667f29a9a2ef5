// Products of a warp, as mma.sync of PTX has them: which lane brings and gets which element.
//
// An element of a result is summed in fp64 and rounded once. A device adds in an order of its own,
// in little more than fp32.
//
// Never instrumented: what the lanes exchange is no memory of the kernel.
#pragma once

namespace modxfer::emulator {

#define MODXFER_UNSEEN __attribute__((no_sanitize("thread")))

// c [16, 8] += a [16, kDepth] b [kDepth, 8]. A register holds 4 bytes along the depth, of a row of
// a or of a column of b. Those of a lane are 8 rows, and then half of the depth apart.
// number(bits, i): element i of a register.
template <int kDepth, class Number>
MODXFER_UNSEEN inline void multiply_add(float (&c)[4], const uint32_t (&a)[4],
                                        const uint32_t (&b)[2], Site site, const Number& number) {
  constexpr int kPacked = kDepth / 8, kHalf = kDepth / 2;
  uint32_t left[kWarp][4], right[kWarp][2];
  for (int pair = 0; pair < 3; ++pair) {
    const uint64_t low = pair < 2 ? a[2 * pair] : b[0], high = pair < 2 ? a[2 * pair + 1] : b[1];
    const uint64_t* lanes = exchange(low | high << 32, site);
    for (int lane = 0; lane < kWarp; ++lane) {
      uint32_t* registers = pair < 2 ? left[lane] + 2 * pair : right[lane];
      registers[0] = static_cast<uint32_t>(lanes[lane]);
      registers[1] = static_cast<uint32_t>(lanes[lane] >> 32);
    }
  }
  const int own = thread_index() % kWarp;
  for (int i = 0; i < 4; ++i) {
    const int row = own / 4 + 8 * (i / 2), column = own % 4 * 2 + i % 2;
    double sum = c[i];
    for (int k = 0; k < kDepth; ++k) {
      const int within = k % kHalf / kPacked, second = k / kHalf;
      const uint32_t x = left[row % 8 * 4 + within][row / 8 + 2 * second];
      const uint32_t y = right[column * 4 + within][second];
      sum += static_cast<double>(number(x, k % kPacked)) * number(y, k % kPacked);
    }
    c[i] = static_cast<float>(sum);
  }
}

}  // namespace modxfer::emulator

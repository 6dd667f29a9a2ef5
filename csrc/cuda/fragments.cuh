// What a lane brings to products of a warp: halves as they are, floats as two numbers of tf32 that
// are nearly their sum. Torch-free.
//
// The terms of a sum may come in any order. So a lane has eight columns side by side, as memory has
// them and as a draw of a dropout mask has them, and a product takes those for columns that PTX has
// apart. Lane l of a warp is in group g = l / 4, at place t = l % 4 of it.
//
//   over columns   a lane has rows g and g + 8 of the left factor and row g of the right one, of
//                  both columns 8 t to 8 t + 7: two products are 32 columns
//   over rows      a lane has rows t, t + 4, t + 8 and t + 12 of both, of the left factor columns
//                  8 g to 8 g + 7, of the right one column g: four products are 64 columns
#pragma once

#include "device.cuh"

namespace modxfer::cuda {

// Numbers of a row side by side; halves in pairs, the first in the lower half.
template <class T>
struct alignas(16) Eight {
  uint32_t pairs[4];
};
template <>
struct alignas(16) Eight<float> {
  float of[8];
};

template <class T>
constexpr bool kIsBf16 = false;
template <>
constexpr bool kIsBf16<device::Bf16> = true;

template <class T>
MODXFER_DEVICE float number(const Eight<T>& x, int i) {
  return device::from_bits(static_cast<uint16_t>(x.pairs[i / 2] >> 16 * (i % 2)), kIsBf16<T>);
}
MODXFER_DEVICE float number(const Eight<float>& x, int i) { return x.of[i]; }

// Which of eight are kept: in the halves of each pair all bits, or none.
struct Kept {
  uint32_t pairs[4];
};

template <class T>
MODXFER_DEVICE void keep(Eight<T>& x, const Kept& kept) {
  MODXFER_UNROLL
  for (int i = 0; i < 4; ++i) x.pairs[i] &= kept.pairs[i];
}
MODXFER_DEVICE void keep(Eight<float>& x, const Kept& kept) {
  MODXFER_UNROLL
  for (int i = 0; i < 8; ++i) {
    x.of[i] = kept.pairs[i / 2] & (i % 2 == 0 ? 1 : 0x10000) ? x.of[i] : 0.0f;
  }
}

// The left factor [16, 16] of a product, of X beside W. A lane has rows h = 0 and 1 of two, and
// terms 2 p + e of four: a register for each p and h, or for each e as well. Beside floats, halves
// are exact in tf32.
template <class X, class W>
struct Left {
  uint32_t of[4];
};
template <class X>
struct Left<X, float> {
  uint32_t high[2][4];
};
template <>
struct Left<float, float> {
  uint32_t high[2][4], low[2][4];
};

// The right factor [16, 8].
template <class W>
struct Right {
  uint32_t of[2];
};
template <>
struct Right<float> {
  uint32_t high[2][2], low[2][2];
};

// x = high + low, but for 2^-22 of it.
MODXFER_DEVICE void split(float x, uint32_t& high, uint32_t& low) {
  high = device::to_tf32(x);
  low = device::to_tf32(x - device::from_tf32(high));
}

// at(h, p, e): an element.
template <class X, class At>
MODXFER_DEVICE Left<X, float> left_of_floats(const At& at) {
  Left<X, float> left;
  MODXFER_UNROLL
  for (int p = 0; p < 2; ++p) {
    MODXFER_UNROLL
    for (int i = 0; i < 4; ++i) {
      const float x = at(i % 2, p, i / 2);
      if constexpr (sizeof(X) == 4) {
        split(x, left.high[p][i], left.low[p][i]);
      } else {
        left.high[p][i] = device::to_tf32(x);
      }
    }
  }
  return left;
}

template <class At>
MODXFER_DEVICE Right<float> right_of_floats(const At& at) {
  Right<float> right;
  MODXFER_UNROLL
  for (int i = 0; i < 4; ++i) split(at(i), right.high[i / 2][i % 2], right.low[i / 2][i % 2]);
  return right;
}

// --- over columns; step: which half of them, 0 or 1

template <class W, class X>
MODXFER_DEVICE Left<X, W> left_of_rows(const Eight<X>& upper, const Eight<X>& lower, int step) {
  if constexpr (sizeof(W) == 2) {
    return {{upper.pairs[2 * step], lower.pairs[2 * step], upper.pairs[2 * step + 1],
             lower.pairs[2 * step + 1]}};
  } else {
    return left_of_floats<X>(
        [&](int h, int p, int e) { return number(h == 0 ? upper : lower, 4 * step + 2 * p + e); });
  }
}

template <class W>
MODXFER_DEVICE Right<W> right_of_row(const Eight<W>& w, int step) {
  if constexpr (sizeof(W) == 2) {
    return {{w.pairs[2 * step], w.pairs[2 * step + 1]}};
  } else {
    return right_of_floats([&](int i) { return w.of[4 * step + i]; });
  }
}

// --- over rows; pair: which two of the columns, 0 to 3: h is the first or the second

template <class W, class X>
MODXFER_DEVICE Left<X, W> left_of_columns(const Eight<X> (&rows)[4], int pair) {
  if constexpr (sizeof(W) == 2) {
    Left<X, W> left;
    MODXFER_UNROLL
    for (int p = 0; p < 2; ++p) {
      const uint32_t a = rows[2 * p].pairs[pair], b = rows[2 * p + 1].pairs[pair];
      left.of[2 * p] = (a & 0xFFFF) | b << 16;
      left.of[2 * p + 1] = a >> 16 | (b & 0xFFFF0000);
    }
    return left;
  } else {
    return left_of_floats<X>(
        [&](int h, int p, int e) { return number(rows[2 * p + e], 2 * pair + h); });
  }
}

// Of a number in shared memory and those 4, 8 and 12 rows below it, so many bytes a row.
template <class W>
MODXFER_DEVICE Right<W> right_of_column(const unsigned char* at, int row_bytes) {
  if constexpr (sizeof(W) == 2) {
    uint32_t bits[4];
    MODXFER_UNROLL
    for (int i = 0; i < 4; ++i) {
      bits[i] = *reinterpret_cast<const uint16_t*>(at + 4 * i * row_bytes);
    }
    return {{bits[0] | bits[1] << 16, bits[2] | bits[3] << 16}};
  } else {
    return right_of_floats(
        [&](int i) { return *reinterpret_cast<const float*>(at + 4 * i * row_bytes); });
  }
}

// sums [16, 8] += left right. A lane has rows h, 2 of them, and columns 2 t and 2 t + 1.
template <class X, class W>
MODXFER_DEVICE void multiply(float (&sums)[4], const Left<X, W>& left, const Right<W>& right) {
  if constexpr (sizeof(W) == 2) {
    device::multiply_add<W>(sums, left.of, right.of);
  } else {
    MODXFER_UNROLL
    for (int p = 0; p < 2; ++p) {
      if constexpr (sizeof(X) == 4) {
        device::multiply_add_tf32(sums, left.low[p], right.high[p]);
      }
      device::multiply_add_tf32(sums, left.high[p], right.low[p]);
      device::multiply_add_tf32(sums, left.high[p], right.high[p]);
    }
  }
}

// To the type of adapters, rounded to nearest.
template <class T>
MODXFER_DEVICE T rounded(float x);
template <>
MODXFER_DEVICE float rounded<float>(float x) {
  return x;
}
template <>
MODXFER_DEVICE device::Bf16 rounded<device::Bf16>(float x) {
  return device::to_bf16(x);
}
template <>
MODXFER_DEVICE device::Half rounded<device::Half>(float x) {
  return device::to_half(x);
}

}  // namespace modxfer::cuda

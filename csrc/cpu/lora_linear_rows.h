// Kernels of a LoRA linear. Included once per instruction set after vec.h, by each_isa.h.
//
//   draw_mask   Philox4x32-7, a draw in each 64-bit lane; what columns share is made once a block
//   shrink      lanes along the width: kShrinkRows x kShrinkRanks dot products in registers
//   expand      lanes along the width: kExpandRows x kExpandVectors results in registers
//   outer       lanes along the width: one vector of x against kOuterRanks sums in registers
//
// A mask is applied to a vector as it is loaded, or as it is stored. Of x only the rows of a tile
// of shrink exist masked, in the first cache.

#if MODXFER_VECTOR_BYTES == 64  // 32 registers
constexpr int kShrinkRows = 6, kShrinkRanks = 4;
constexpr int kExpandRows = 8, kExpandVectors = 2;
constexpr int kOuterRanks = 16;
#else  // 16 registers
constexpr int kShrinkRows = 4, kShrinkRanks = 2;
constexpr int kExpandRows = 4, kExpandVectors = 2;
constexpr int kOuterRanks = 8;
#endif

// How far ahead outer, which walks down the rows, asks for columns.
constexpr int kPrefetchVectors = 4;

// Panels that stay in the second cache while several rows pass over them.
constexpr int64_t kPanelBlockBytes = 256 * 1024;
// At most so many columns of them: kShrinkRows rows of these stay in the first cache.
constexpr int64_t kBlockColumns = 1024;

typedef unsigned long long vw __attribute__((vector_size(MODXFER_VECTOR_BYTES)));
typedef unsigned short vh __attribute__((vector_size(MODXFER_VECTOR_BYTES)));
typedef float vf4 __attribute__((vector_size(16)));
typedef int vi4 __attribute__((vector_size(16)));

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "masks are read by bytes");

template <int kValue>
struct Size {
  static constexpr int value = kValue;
};

// Calls body(Size<n>, i) over [begin, end) with n = kStep as often as it fits, then its halves.
template <int kStep, class Body>
MODXFER_INLINE void in_steps(int64_t begin, int64_t end, const Body& body) {
  for (; begin + kStep <= end; begin += kStep) body(Size<kStep>{}, begin);
  if constexpr (kStep > 1) in_steps<kStep / 2>(begin, end, body);
}

// Into the second cache: rows a power of two apart share a few lines of the first. Addresses past
// the end of a tensor do no harm.
MODXFER_INLINE void prefetch(const float* address) { __builtin_prefetch(address, 0, 2); }

// Calls body(0), ... body(kCount - 1), written out: arrays indexed by it live in registers.
template <int kCount, int kFirst = 0, class Body>
MODXFER_INLINE void unrolled(const Body& body) {
  if constexpr (kFirst < kCount) {
    body(kFirst);
    unrolled<kCount, kFirst + 1>(body);
  }
}

// Calls body(begin, end) for blocks of columns whose panels fit kPanelBlockBytes.
template <class Body>
MODXFER_INLINE void for_each_panel_block(int64_t R, int64_t W, const Body& body) {
  const int64_t panel_bytes = R * kLanes * static_cast<int64_t>(sizeof(float));
  const int64_t panels = kPanelBlockBytes / panel_bytes;
  const int64_t columns = (panels < 4 ? 4 : panels) * kLanes;
  const int64_t block = columns < kBlockColumns ? columns : kBlockColumns;
  for (int64_t i = 0; i < W; i += block) body(i, i + block < W ? i + block : W);
}

// The bits of a mask's row for the columns from i on, a multiple of kLanes. Those past the first
// kLanes are unspecified.
MODXFER_INLINE unsigned kept_bits(const Mask& mask, int64_t row, int64_t i) {
  const char* bytes = reinterpret_cast<const char*>(mask.words + row * mask.stride) + i / 8;
  if constexpr (kLanes == 16) {
    unsigned short bits;
    __builtin_memcpy(&bits, bytes, sizeof(bits));
    return bits;
  } else {
    return static_cast<unsigned char>(*bytes) >> (i % 8);
  }
}

// x where the bit is set, 0 elsewhere
MODXFER_INLINE vf keep(vf x, unsigned bits) {
#if MODXFER_VECTOR_BYTES == 64 && defined(MODXFER_X86_TARGETS)
  return (vf)_mm512_maskz_mov_ps(static_cast<__mmask16>(bits), (__m512)x);
#else
  constexpr int kBits[16] = {1 << 0, 1 << 1, 1 << 2,  1 << 3,  1 << 4,  1 << 5,  1 << 6,  1 << 7,
                             1 << 8, 1 << 9, 1 << 10, 1 << 11, 1 << 12, 1 << 13, 1 << 14, 1 << 15};
  vi bit;
  __builtin_memcpy(&bit, kBits, sizeof(bit));
  return (vf)((vi)x & ((bit & static_cast<int>(bits)) == bit));
#endif
}

template <bool kMasked>
MODXFER_INLINE vf load_kept(const Matrix& x, const Mask& mask, int64_t row, int64_t i, int n) {
  const vf values = load_or_zero(x.data + row * x.stride + i, n);
  if constexpr (kMasked) return keep(values, kept_bits(mask, row, i));
  return values;
}

// The lower halves of the lanes of x times a factor.
MODXFER_INLINE vw multiply_low(vw x, unsigned factor) {
#if !defined(MODXFER_X86_TARGETS)
  return (x & 0xffffffffULL) * static_cast<unsigned long long>(factor);
#elif MODXFER_VECTOR_BYTES == 64
  return (vw)_mm512_maskz_mul_epu32(0xff, (__m512i)x, _mm512_set1_epi64(factor));
#elif MODXFER_VECTOR_BYTES == 32
  return (vw)_mm256_mul_epu32((__m256i)x, _mm256_set1_epi64x(factor));
#else
  return (vw)_mm_mul_epu32((__m128i)x, _mm_set1_epi64x(factor));
#endif
}

constexpr int kDraws = kLanes / 2;  // a lane of 64 bits each
typedef unsigned char vd __attribute__((vector_size(kDraws)));

MODXFER_INLINE vw lane_numbers() {
  constexpr unsigned long long kLane[8] = {0, 1, 2, 3, 4, 5, 6, 7};
  vw lanes;
  __builtin_memcpy(&lanes, kLane, sizeof(lanes));
  return lanes;
}

#include "modxfer/philox.h"

// Bytes of a mask, one a lane, of a row that its first key leaves as `row_word`. Halves up to
// `largest_dropped` are dropped.
MODXFER_INLINE vw draw(const RoundKeys& keys, const ColumnDraws& columns, unsigned row_word,
                       unsigned short largest_dropped) {
  const Draws draws = draws_of(keys, columns, row_word);
  // halves 0 to 3 of a draw side by side in its lane, and 4 to 7; then the bit of each
  const vh halves_low = (vh)((draws.words[0] & 0xffffffffULL) | (draws.words[1] << 32));
  const vh halves_high = (vh)((draws.words[2] & 0xffffffffULL) | (draws.words[3] << 32));
  const vh limit = vh{} + largest_dropped;
  const vw bits_low = vw{} + 0x0008000400020001ULL, bits_high = vw{} + 0x0080004000200010ULL;
  vw bits = ((vw)(halves_low > limit) & bits_low) | ((vw)(halves_high > limit) & bits_high);
  bits |= bits >> 32;
  bits |= bits >> 16;
  return bits & 0xffULL;
}

void draw_mask(const DropoutKey& key, int64_t first_row, int64_t rows, int64_t num_words,
               uint32_t* words, int64_t stride) {
  const int64_t num_bytes = 4 * num_words;
  const RoundKeys keys = round_keys(key.seed);
  const unsigned row_key = static_cast<unsigned>(key.seed);
  const auto limit = static_cast<unsigned short>(key.threshold - 1);
  for (int64_t byte = 0; byte < num_bytes; byte += kDraws) {
    const ColumnDraws columns =
        column_draws(keys, key.target, lane_numbers() + static_cast<unsigned>(byte));
    for (int64_t row = 0; row < rows; ++row) {
      const vd bytes = __builtin_convertvector(
          draw(keys, columns, static_cast<unsigned>(first_row + row) ^ row_key, limit), vd);
      auto* target = reinterpret_cast<unsigned char*>(words + row * stride) + byte;
      __builtin_memcpy(target, &bytes, num_bytes - byte < kDraws ? 4 : kDraws);
    }
  }
}

// Sums of the lanes that agree modulo four.
MODXFER_INLINE vf4 fold_to_four(vf x) {
  vf4 quarters[kLanes / 4];
  __builtin_memcpy(quarters, &x, sizeof(x));
  if constexpr (kLanes == 16) {
    return (quarters[0] + quarters[2]) + (quarters[1] + quarters[3]);
  } else if constexpr (kLanes == 8) {
    return quarters[0] + quarters[1];
  } else {
    return quarters[0];
  }
}

// The sums of up to four vectors.
template <int kCount>
MODXFER_INLINE vf4 reduce_sums(const vf* sums) {
  vf4 a[4] = {};
  unrolled<kCount>([&](int i) __attribute__((always_inline)) { a[i] = fold_to_four(sums[i]); });
  // a transpose of four by four whose rows are added as they appear
  const vf4 t0 = __builtin_shuffle(a[0], a[1], vi4{0, 4, 1, 5}) +
                 __builtin_shuffle(a[0], a[1], vi4{2, 6, 3, 7});
  const vf4 t1 = __builtin_shuffle(a[2], a[3], vi4{0, 4, 1, 5}) +
                 __builtin_shuffle(a[2], a[3], vi4{2, 6, 3, 7});
  return __builtin_shuffle(t0, t1, vi4{0, 1, 4, 5}) + __builtin_shuffle(t0, t1, vi4{2, 3, 6, 7});
}

template <bool kMasked>
void shrink_as(const Matrix& x, const Mask& mask, int64_t rows, int64_t K, const float* a_panels,
               int64_t R, float scale, float* s, int64_t s_stride) {
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t r = 0; r < R; ++r) s[row * s_stride + r] = 0.0f;
  }
  // every pass over the ranks reads what the mask left; making that costs as much as a few ranks
  alignas(64) float kept[kMasked ? kShrinkRows : 1][kMasked ? kBlockColumns : 1];
  for_each_panel_block(R, K, [&](int64_t begin, int64_t end) __attribute__((always_inline)) {
    in_steps<kShrinkRows>(0, rows, [&](auto m_size, int64_t row) __attribute__((always_inline)) {
      constexpr int kM = decltype(m_size)::value;
      if constexpr (kMasked) {
        for (int m = 0; m < kM; ++m) {
          for_each_vector(begin, end, [&](int64_t i, int n) __attribute__((always_inline)) {
            prefetch(x.data + (row + m + kM) * x.stride + i);
            store(kept[m] + (i - begin), load_kept<true>(x, mask, row + m, i, n));
          });
        }
      }
      in_steps<kShrinkRanks>(0, R, [&](auto r_size, int64_t rank) __attribute__((always_inline)) {
        constexpr int kR = decltype(r_size)::value;
        vf sums[kM][kR] = {};
        for_each_vector(begin, end, [&](int64_t i, int n) __attribute__((always_inline)) {
          const float* a = a_panels + i * R + rank * kLanes;
          vf weights[kR];
          unrolled<kR>([&](int r)
                           __attribute__((always_inline)) { weights[r] = load(a + r * kLanes); });
          unrolled<kM>([&](int m) __attribute__((always_inline)) {
            vf values;
            if constexpr (kMasked) {
              values = load(kept[m] + (i - begin));
            } else {
              if (rank == 0) prefetch(x.data + (row + m + kM) * x.stride + i);
              values = load_or_zero(x.data + (row + m) * x.stride + i, n);
            }
            unrolled<kR>([&](int r)
                             __attribute__((always_inline)) { sums[m][r] += values * weights[r]; });
          });
        });
        unrolled<kM>([&](int m) __attribute__((always_inline)) {
          const vf4 totals = reduce_sums<kR>(sums[m]);
          float* target = s + (row + m) * s_stride + rank;
          for (int r = 0; r < kR; ++r) target[r] += scale * totals[r];
        });
      });
    });
  });
}

template <bool kMasked>
void expand_as(const Matrix& s, int64_t rows, int64_t R, const float* panels, int64_t W,
               const Mask& mask, const Matrix& init, float* y, int64_t y_stride) {
  for_each_panel_block(R, W, [&](int64_t begin, int64_t end) __attribute__((always_inline)) {
    in_steps<kExpandRows>(0, rows, [&](auto m_size, int64_t row) __attribute__((always_inline)) {
      const int64_t last = begin / kLanes + (end - begin + kLanes - 1) / kLanes;
      in_steps<kExpandVectors>(
          begin / kLanes, last, [&](auto v_size, int64_t panel) __attribute__((always_inline)) {
            constexpr int kM = decltype(m_size)::value, kV = decltype(v_size)::value;
            const float* p = panels + panel * R * kLanes;
            unrolled<kM>([&](int m) __attribute__((always_inline)) {
              float* ahead = y + (row + m + kM) * y_stride + panel * kLanes;
              for (int v = 0; v < kV; ++v) prefetch(ahead + v * kLanes);
            });
            vf sums[kM][kV] = {};
            for (int64_t r = 0; r < R; ++r) {
              vf weights[kV];
              unrolled<kV>([&](int v) __attribute__((always_inline)) {
                weights[v] = load(p + (v * R + r) * kLanes);
              });
              unrolled<kM>([&](int m) __attribute__((always_inline)) {
                const float factor = s.data[(row + m) * s.stride + r];
                unrolled<kV>([&](int v) __attribute__((always_inline)) {
                  sums[m][v] += factor * weights[v];
                });
              });
            }
            unrolled<kV>([&](int v) __attribute__((always_inline)) {
              const int64_t i = (panel + v) * kLanes;
              const int n = W - i < kLanes ? static_cast<int>(W - i) : kLanes;
              unrolled<kM>([&](int m) __attribute__((always_inline)) {
                vf sum = sums[m][v];
                if constexpr (kMasked) sum = keep(sum, kept_bits(mask, row + m, i));
                if (init.data != nullptr) {
                  sum += load_or_zero(init.data + (row + m) * init.stride + i, n);
                }
                store_n(y + (row + m) * y_stride + i, n, sum);
              });
            });
          });
    });
  });
}

template <bool kMasked>
void outer_as(const Matrix& s, const Matrix& x, const Mask& mask, int64_t rows, int64_t R,
              int64_t W, bool accumulate, float* grad) {
  for_each_vector(0, W, [&](int64_t i, int n) __attribute__((always_inline)) {
    in_steps<kOuterRanks>(0, R, [&](auto r_size, int64_t rank) __attribute__((always_inline)) {
      constexpr int kR = decltype(r_size)::value;
      vf sums[kR] = {};
      for (int64_t row = 0; row < rows; ++row) {
        if (rank == 0) prefetch(x.data + row * x.stride + i + kPrefetchVectors * kLanes);
        const vf values = load_kept<kMasked>(x, mask, row, i, n);
        const float* factors = s.data + row * s.stride + rank;
        unrolled<kR>([&](int r) __attribute__((always_inline)) { sums[r] += factors[r] * values; });
      }
      float* target = grad + i * R + rank * kLanes;
      unrolled<kR>([&](int r) __attribute__((always_inline)) {
        store(target + r * kLanes, accumulate ? load(target + r * kLanes) + sums[r] : sums[r]);
      });
    });
  });
}

void shrink(Matrix x, Mask mask, int64_t rows, int64_t K, const float* a_panels, int64_t R,
            float scale, float* s, int64_t s_stride) {
  const auto run = mask.words != nullptr ? shrink_as<true> : shrink_as<false>;
  run(x, mask, rows, K, a_panels, R, scale, s, s_stride);
}

void expand(Matrix s, int64_t rows, int64_t R, const float* panels, int64_t W, Mask mask,
            Matrix init, float* y, int64_t y_stride) {
  const auto run = mask.words != nullptr ? expand_as<true> : expand_as<false>;
  run(s, rows, R, panels, W, mask, init, y, y_stride);
}

void outer(Matrix s, Matrix x, Mask mask, int64_t rows, int64_t R, int64_t W, bool accumulate,
           float* grad) {
  const auto run = mask.words != nullptr ? outer_as<true> : outer_as<false>;
  run(s, x, mask, rows, R, W, accumulate, grad);
}

constexpr LoraKernels kKernels{kIsaName, kLanes, draw_mask, shrink, expand, outer};

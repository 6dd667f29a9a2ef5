// LoRA kernels of every instruction set this processor has, against the definitions in long double,
// and masks against the definition a draw at a time.
//
// Built with AddressSanitizer: every row is a heap block of exactly its floats that begins at an
// address no vector is aligned to, and masks end with their last word.

#include "lora_linear_isa.cpp"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

namespace {

using modxfer::DropoutKey;
using modxfer::LoraKernels;
using modxfer::Mask;
using modxfer::Matrix;
using Real = long double;

int failures = 0;
std::mt19937 random_bits(0);

float normal() {
  static std::normal_distribution<float> distribution;
  return distribution(random_bits);
}

// Rows of W floats, `gap` apart, whose last ends a heap block and whose first is 4 bytes into it.
class Rows {
 public:
  Rows(int64_t rows, int64_t W, int64_t gap = 3)
      : W_(W), stride_(W + gap), block_(new float[1 + (rows - 1) * stride_ + W]) {
    for (int64_t i = 0; i < 1 + (rows - 1) * stride_ + W; ++i) block_[i] = std::nanf("");
  }
  void fill(int64_t rows) {
    for (int64_t m = 0; m < rows; ++m) {
      for (int64_t i = 0; i < W_; ++i) at(m, i) = normal();
    }
  }
  float& at(int64_t m, int64_t i) { return block_[1 + m * stride_ + i]; }
  float* data() { return block_.get() + 1; }
  int64_t stride() const { return stride_; }
  Matrix matrix() { return {data(), stride_}; }

 private:
  int64_t W_, stride_;
  std::unique_ptr<float[]> block_;
};

// A matrix [R, W] in panels.
class Panels {
 public:
  Panels(int64_t lanes, int64_t R, int64_t W)
      : lanes_(lanes), R_(R), size_((W + lanes - 1) / lanes * R * lanes), block_(new float[size_]) {
    for (int64_t i = 0; i < size_; ++i) block_[i] = 0.0f;
  }
  void fill(int64_t W) {
    for (int64_t r = 0; r < R_; ++r) {
      for (int64_t i = 0; i < W; ++i) at(r, i) = normal();
    }
  }
  float& at(int64_t r, int64_t i) { return block_[(i / lanes_ * R_ + r) * lanes_ + i % lanes_]; }
  float* data() { return block_.get(); }

 private:
  int64_t lanes_, R_, size_;
  std::unique_ptr<float[]> block_;
};

void expect_near(float got, Real expected, Real magnitude, const char* isa, const char* what,
                 int64_t R, int64_t W) {
  // a sum of floats in any order: an epsilon of its largest addends for each of a few tens of steps
  if (std::abs(static_cast<Real>(got) - expected) <= 4e-6L * (magnitude + 1)) return;  // not NaN
  ++failures;
  std::fprintf(stderr, "%s %s: R=%lld W=%lld: expected %.9Lg, got %.9g\n", isa, what,
               static_cast<long long>(R), static_cast<long long>(W), expected, got);
}

void check_block(const LoraKernels& kernels, int64_t rows, int64_t R, int64_t W, bool masked) {
  const int64_t num_words = (W + 31) / 32;
  std::unique_ptr<uint32_t[]> words(new uint32_t[rows * num_words]);
  for (int64_t i = 0; i < rows * num_words; ++i) words[i] = random_bits();
  const Mask mask{masked ? words.get() : nullptr, num_words};
  const auto kept = [&](int64_t m, int64_t i) {
    return !masked || (words[m * num_words + i / 32] >> (i % 32) & 1);
  };
  Rows x(rows, W), s(rows, R), init(rows, W), y(rows, W), shrunk(rows, R);
  Panels a(kernels.lanes, R, W), grad(kernels.lanes, R, W);
  x.fill(rows), s.fill(rows), init.fill(rows), a.fill(W);

  kernels.shrink(x.matrix(), mask, rows, W, a.data(), R, 0.5f, shrunk.data(), shrunk.stride());
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t r = 0; r < R; ++r) {
      Real sum = 0, magnitude = 0;
      for (int64_t i = 0; i < W; ++i) {
        const Real addend = kept(m, i) ? 0.5L * x.at(m, i) * a.at(r, i) : 0;
        sum += addend, magnitude += std::abs(addend);
      }
      expect_near(shrunk.at(m, r), sum, magnitude, kernels.isa, "shrink", R, W);
    }
  }

  const auto check_expand = [&](Matrix from, auto before) {
    kernels.expand(s.matrix(), rows, R, a.data(), W, mask, from, y.data(), y.stride());
    for (int64_t m = 0; m < rows; ++m) {
      for (int64_t i = 0; i < W; ++i) {
        Real sum = before(m, i), magnitude = std::abs(sum);
        for (int64_t r = 0; r < R && kept(m, i); ++r) {
          const Real addend = static_cast<Real>(s.at(m, r)) * a.at(r, i);
          sum += addend, magnitude += std::abs(addend);
        }
        expect_near(y.at(m, i), sum, magnitude, kernels.isa, "expand", R, W);
      }
    }
  };
  check_expand({nullptr, 0}, [](int64_t, int64_t) { return Real{0}; });
  check_expand(init.matrix(), [&](int64_t m, int64_t i) { return Real{init.at(m, i)}; });
  check_expand({init.data(), 0}, [&](int64_t, int64_t i) { return Real{init.at(0, i)}; });
  std::vector<float> before(rows * W);
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t i = 0; i < W; ++i) before[m * W + i] = y.at(m, i);
  }
  check_expand(y.matrix(), [&](int64_t m, int64_t i) { return Real{before[m * W + i]}; });

  for (int times = 1; times <= 2; ++times) {
    kernels.outer(s.matrix(), x.matrix(), mask, rows, R, W, times == 2, grad.data());
    for (int64_t r = 0; r < R; ++r) {
      for (int64_t i = 0; i < W; ++i) {
        Real sum = 0, magnitude = 0;
        for (int64_t m = 0; m < rows; ++m) {
          const Real addend = kept(m, i) ? static_cast<Real>(s.at(m, r)) * x.at(m, i) : 0;
          sum += times * addend, magnitude += times * std::abs(addend);
        }
        expect_near(grad.at(r, i), sum, magnitude, kernels.isa, "outer", R, W);
      }
    }
  }
}

// The definition, a draw at a time: the byte of a mask that is drawn with this counter.
unsigned byte_of(const DropoutKey& key, uint32_t row, uint32_t index) {
  uint32_t c[4] = {index, row, 0, key.target};
  uint32_t k[2] = {static_cast<uint32_t>(key.seed), static_cast<uint32_t>(key.seed >> 32)};
  for (int round = 0; round < 7; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53} * c[0], p1 = uint64_t{0xCD9E8D57} * c[2];
    const uint32_t next[4] = {
        static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ k[0], static_cast<uint32_t>(p1),
        static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ k[1], static_cast<uint32_t>(p0)};
    std::copy(next, next + 4, c);
    k[0] += 0x9E3779B9, k[1] += 0xBB67AE85;
  }
  unsigned byte = 0;
  for (int half = 0; half < 8; ++half) {
    const uint32_t value = c[half / 2] >> (16 * (half % 2)) & 0xffff;
    byte |= static_cast<unsigned>(value >= key.threshold) << half;
  }
  return byte;
}

void check_mask(const LoraKernels& kernels, const DropoutKey& key, int64_t num_words) {
  const int64_t rows = 3, first_row = 1000003, stride = num_words + 1;
  std::unique_ptr<uint32_t[]> words(new uint32_t[(rows - 1) * stride + num_words]);
  for (int64_t i = 0; i < (rows - 1) * stride + num_words; ++i) words[i] = 0xdeadbeef;
  kernels.draw_mask(key, first_row, rows, num_words, words.get(), stride);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t byte = 0; byte < 4 * num_words; ++byte) {
      const unsigned got = words[row * stride + byte / 4] >> (8 * (byte % 4)) & 0xff;
      const unsigned expected = byte_of(key, static_cast<uint32_t>(first_row + row), byte);
      if (got == expected) continue;
      ++failures;
      std::fprintf(stderr, "%s mask: words=%lld threshold=%u byte %lld: expected %02x, got %02x\n",
                   kernels.isa, static_cast<long long>(num_words), key.threshold,
                   static_cast<long long>(byte), expected, got);
    }
    if (row + 1 < rows && words[row * stride + num_words] != 0xdeadbeef) ++failures;
  }
}

}  // namespace

int main() {
  std::vector<int64_t> widths;
  for (int64_t W = 1; W <= 49; ++W) widths.push_back(W);  // every remainder of 16 lanes, thrice
  for (modxfer::Isa isa : modxfer::kIsas) {
    if (!modxfer::has_isa(isa)) continue;
    modxfer::isa_in_use() = isa;
    const LoraKernels& kernels = modxfer::lora_kernels();
    int checked = 0;
    const auto check = [&](int64_t rows, int64_t R, int64_t W) {
      for (bool masked : {false, true}) check_block(kernels, rows, R, W, masked), checked += rows;
    };
    for (int64_t W : widths) check(5, 3, W);
    for (int64_t R = 1; R <= 33; ++R) check(7, R, 37);              // every tile of ranks
    for (int64_t rows = 1; rows <= 17; ++rows) check(rows, 4, 21);  // every tile of rows
    check(9, 130, 700);  // more panels than one block of them
    for (int64_t num_words : {1, 2, 3, 4, 5, 17}) {
      for (uint32_t threshold : {1u, 6554u, 65535u, 65536u}) {
        check_mask(kernels, {0xfedcba9876543210, 2, threshold}, num_words);
        checked += 3;
      }
    }
    std::printf("%s: %d rows\n", kernels.isa, checked);
  }
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}

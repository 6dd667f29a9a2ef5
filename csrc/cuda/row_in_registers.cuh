// A row of a matrix as the threads of a block have it: in their registers, read from memory once;
// or, where it is wider than those, read again in each pass. Torch-free.
#pragma once

#include "rows.cuh"

namespace modxfer::cuda {

// Rows so many elements apart, of a dtype that is known at run time.
struct Matrix {
  void* rows;
  int64_t stride;
  Kind kind;
};

constexpr int kStreamed = 0;  // registers of a row that is read in each pass

// A thread has four neighbours of each step that the block takes along the row, kFours steps at
// most. Elements past the end of the row are 0.
template <int kFours>
class RowInRegisters {
 public:
  MODXFER_DEVICE RowInRegisters(const Matrix& of, int row, int width)
      : row_(static_cast<const unsigned char*>(of.rows) + row * of.stride * size_of(of.kind)),
        kind_(of.kind),
        width_(width) {
    const uint64_t bits = reinterpret_cast<uintptr_t>(row_);
    is_whole_ = width % 4 == 0 && bits % (4 * size_of(kind_)) == 0;
  }

  // Starts to read: of several rows, all before the first of them is widened.
  MODXFER_DEVICE void read() {
    if (is_whole_ && kind_ == Kind::kFloat) {
      for_each_four([&](int k, int i) {
        if (i < width_) fours_[k] = *reinterpret_cast<const Words*>(row_ + 4 * i);
      });
    } else if (is_whole_) {
      for_each_four([&](int k, int i) {
        if (i >= width_) return;
        const HalfWords pairs = *reinterpret_cast<const HalfWords*>(row_ + 2 * i);
        fours_[k].of[0] = pairs.of[0];
        fours_[k].of[1] = pairs.of[1];
      });
    } else {
      for_each_four([&](int k, int i) {
        MODXFER_UNROLL
        for (int j = 0; j < 4; ++j) {
          if (i + j >= width_) break;
          if (kind_ == Kind::kFloat) {
            fours_[k].of[j] = reinterpret_cast<const uint32_t*>(row_)[i + j];
          } else {
            const uint32_t bits = reinterpret_cast<const uint16_t*>(row_)[i + j];
            fours_[k].of[j / 2] |= bits << (16 * (j % 2));
          }
        }
      });
    }
  }

  MODXFER_DEVICE void widen() {
    if (kind_ == Kind::kFloat) return;
    const bool is_bf16 = kind_ == Kind::kBf16;
    for_each_four([&](int k, int i) {
      const Words pairs = fours_[k];
      MODXFER_UNROLL
      for (int j = 0; j < 4; ++j) {
        const auto half = static_cast<uint16_t>(pairs.of[j / 2] >> (16 * (j % 2)));
        fours_[k].of[j] = device::bits_of(device::from_bits(half, is_bf16));
      }
    });
  }

  // From now on the elements are x - mean; those past the end of the row remain 0.
  MODXFER_DEVICE void centre(float mean) {
    mean_ = mean;
    for_each_four([&](int k, int i) {
      MODXFER_UNROLL
      for (int j = 0; j < 4; ++j) {
        const float centred = device::float_of(fours_[k].of[j]) - mean;
        fours_[k].of[j] = i + j < width_ ? device::bits_of(centred) : 0;
      }
    });
  }

  // From now on they are x scale, rounded: equal rows have a difference of 0, which a fused
  // multiply-add would not leave.
  MODXFER_DEVICE void scale(float scale) {
    scale_ = scale;
    for_each_four([&](int k, int i) {
      MODXFER_UNROLL
      for (int j = 0; j < 4; ++j) {
        fours_[k].of[j] =
            device::bits_of(device::product(device::float_of(fours_[k].of[j]), scale));
      }
    });
  }

  // The elements from i on, those of step k.
  MODXFER_DEVICE Four at(int k, int i) const {
    Four x;
    if constexpr (kFours == kStreamed) {
      const unsigned char* from = row_ + static_cast<int64_t>(i) * size_of(kind_);
      read_four(from, kind_, is_whole_, width_ - i < 4 ? width_ - i : 4, x);
    }
    MODXFER_UNROLL
    for (int j = 0; j < 4; ++j) {
      if constexpr (kFours != kStreamed) {
        x.of[j] = device::float_of(fours_[k].of[j]);
      } else {
        x.of[j] = i + j < width_ ? device::product(x.of[j] - mean_, scale_) : 0.0f;
      }
    }
    return x;
  }

  // Registers of step k have other values from now on.
  MODXFER_DEVICE void set(int k, const Four& values) {
    MODXFER_UNROLL
    for (int j = 0; j < 4; ++j) fours_[k].of[j] = device::bits_of(values.of[j]);
  }

 private:
  struct alignas(16) Words {
    uint32_t of[4];
  };
  struct alignas(8) HalfWords {
    uint32_t of[2];
  };

  template <class Body>
  MODXFER_DEVICE void for_each_four(const Body& body) {
    MODXFER_UNROLL
    for (int k = 0; k < kFours; ++k) {
      body(k, 4 * (k * device::block_size() + device::thread_index()));
    }
  }

  const unsigned char* row_;
  Kind kind_;
  int width_;
  bool is_whole_;
  float mean_ = 0.0f, scale_ = 1.0f;  // of a row that is read in each pass
  Words fours_[kFours == kStreamed ? 1 : kFours] =
      {};  // of halves, the bits until they are widened
};

// Calls body(k, i) in each step of the block along a row, whose elements from i on this thread has:
// also in those where it has none.
template <int kFours, class Body>
MODXFER_DEVICE void for_each_step(int width, const Body& body) {
  const int size = 4 * device::block_size(), first = 4 * device::thread_index();
  if constexpr (kFours == kStreamed) {
    for (int step = 0; step < width; step += size) body(0, step + first);
  } else {
    MODXFER_UNROLL
    for (int k = 0; k < kFours; ++k) body(k, k * size + first);
  }
}

}  // namespace modxfer::cuda

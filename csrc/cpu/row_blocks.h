// What passes over blocks of rows share: packed factors, blocks of rows as fp32, sums over chunks.
//
// M rows   K, W widths   R rank; panels as in modxfer/lora_linear.h
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <new>
#include <vector>

#include "modxfer/lora_linear.h"
#include "modxfer/ops.h"
#include "rows.h"

namespace modxfer {

// Floats that begin at a cache line, not initialised.
class Buffer {
 public:
  explicit Buffer(int64_t size)
      : data_(static_cast<float*>(::operator new(size * sizeof(float), std::align_val_t{64}))) {}
  ~Buffer() { ::operator delete(data_, std::align_val_t{64}); }
  Buffer(Buffer&& other) noexcept : data_(other.data_) { other.data_ = nullptr; }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  float* data() const { return data_; }

 private:
  float* data_;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t panel_size(int64_t R, int64_t width) {
  const int64_t lanes = lora_kernels().lanes;
  return ceil_div(width, lanes) * R * lanes;
}

template <class T>
void pack_as(const Tensor& source, int64_t R, int64_t W, int64_t stride_r, int64_t stride_w,
             float* panels) {
  const int64_t lanes = lora_kernels().lanes;
  const T* data = static_cast<const T*>(source.data_ptr());
  torch::stable::parallel_for(
      0, ceil_div(W, lanes), std::max<int64_t>(1, 16384 / (R * lanes)),
      [&](int64_t begin, int64_t end) {
        for (int64_t panel = begin; panel < end; ++panel) {
          for (int64_t r = 0; r < R; ++r) {
            float* target = panels + (panel * R + r) * lanes;
            for (int64_t lane = 0; lane < lanes; ++lane) {
              const int64_t w = panel * lanes + lane;
              target[lane] = w < W ? static_cast<float>(data[r * stride_r + w * stride_w]) : 0.0f;
            }
          }
        }
      });
}

// Panels of a matrix [R, W] with any strides: an adapter's A, or the transpose of its B.
inline Buffer pack(const Tensor& source, int64_t R, int64_t W, int64_t stride_r, int64_t stride_w) {
  Buffer panels(panel_size(R, W));
  switch (source.scalar_type()) {
    case torch::headeronly::ScalarType::Float:
      pack_as<float>(source, R, W, stride_r, stride_w, panels.data());
      break;
    case torch::headeronly::ScalarType::BFloat16:
      pack_as<c10::BFloat16>(source, R, W, stride_r, stride_w, panels.data());
      break;
    case torch::headeronly::ScalarType::Half:
      pack_as<c10::Half>(source, R, W, stride_r, stride_w, panels.data());
      break;
    default:
      STD_TORCH_CHECK(false, "adapters: expected float32, bfloat16 or float16");
  }
  return panels;
}

inline Buffer pack_a(const Tensor& a) {
  return pack(a, a.size(0), a.size(1), a.stride(0), a.stride(1));
}

inline Buffer pack_b(const Tensor& b) {
  return pack(b, b.size(1), b.size(0), b.stride(1), b.stride(0));
}

// Blocks of rows of a tensor as fp32: in place for fp32 rows that follow each other, otherwise
// through a buffer of its own.
class RowBlock {
 public:
  // index: where given, row i of a block is row index[i] of the tensor.
  RowBlock(const Tensor& tensor, int64_t max_rows, const int64_t* index = nullptr)
      : rows_(tensor),
        index_(index),
        width_(tensor.size(1)),
        in_place_(rows_.is_float() && index == nullptr),
        data_(static_cast<float*>(tensor.data_ptr())),
        stride_(in_place_ ? tensor.stride(0) : tensor.size(1)),
        buffer_(in_place_ ? 0 : width_ * max_rows) {}

  Matrix read(int64_t first, int64_t rows) {
    if (in_place_) return {data_ + first * stride_, stride_};
    for (int64_t row = 0; row < rows; ++row) {
      float* target = buffer_.data() + row * width_;
      const float* source = rows_.read(at(first + row), target);
      if (source != target) std::copy_n(source, width_, target);
    }
    return {buffer_.data(), stride_};
  }

  // Where to write rows; `commit` them afterwards.
  float* target(int64_t first) { return in_place_ ? data_ + first * stride_ : buffer_.data(); }
  void commit(int64_t first, int64_t rows) {
    if (in_place_) return;
    for (int64_t row = 0; row < rows; ++row) {
      float* source = buffer_.data() + row * width_;
      float* target = rows_.target(at(first + row), source);
      if (target == source) {
        rows_.commit(at(first + row), source);
      } else {
        std::copy_n(source, width_, target);
      }
    }
  }
  int64_t stride() const { return stride_; }

 private:
  int64_t at(int64_t row) const { return index_ == nullptr ? row : index_[row]; }

  Rows rows_;
  const int64_t* index_;
  int64_t width_;
  bool in_place_;
  float* data_;
  int64_t stride_;
  Buffer buffer_;
};

using RowBlocks = std::vector<RowBlock>;

inline RowBlocks row_blocks(const std::vector<Tensor>& tensors, int64_t max_rows) {
  RowBlocks blocks;
  for (const Tensor& tensor : tensors) blocks.emplace_back(tensor, max_rows);
  return blocks;
}

// Rows whose fp32 values take about an eighth of a second cache of 1 MiB.
inline int64_t rows_per_block(int64_t width) {
  return std::clamp<int64_t>(32768 / std::max<int64_t>(width, 1), 8, 32);
}

// Rows whose gradients are summed apart: at most 32 chunks, so that their sums stay small beside x.
inline int64_t rows_per_chunk(int64_t M) {
  return std::max<int64_t>(128, ceil_div(ceil_div(M, 32), 32) * 32);
}

// Sums of s^T x over chunks of rows, [chunks] panels each; summed over the chunks at the end.
class OuterSums {
 public:
  OuterSums(int64_t chunks, int64_t R, int64_t W)
      : chunks_(chunks), R_(R), W_(W), size_(panel_size(R, W)), buffer_(chunks * size_) {}

  float* chunk(int64_t index) const { return buffer_.data() + index * size_; }

  // out [R, W], or its transpose, with any strides
  void write(const Tensor& out, int64_t stride_r, int64_t stride_w) const {
    switch (out.scalar_type()) {
      case torch::headeronly::ScalarType::Float:
        return write_as<float>(out, stride_r, stride_w);
      case torch::headeronly::ScalarType::BFloat16:
        return write_as<c10::BFloat16>(out, stride_r, stride_w);
      default:
        return write_as<c10::Half>(out, stride_r, stride_w);
    }
  }

 private:
  template <class T>
  void write_as(const Tensor& out, int64_t stride_r, int64_t stride_w) const {
    const int64_t lanes = lora_kernels().lanes;
    T* data = static_cast<T*>(out.data_ptr());
    torch::stable::parallel_for(
        0, ceil_div(W_, lanes), std::max<int64_t>(1, 65536 / ((chunks_ + 1) * R_ * lanes)),
        [&](int64_t begin, int64_t end) {
          std::vector<float> sums(R_ * lanes);
          for (int64_t panel = begin; panel < end; ++panel) {
            std::fill(sums.begin(), sums.end(), 0.0f);
            for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
              const float* addend = buffer_.data() + chunk * size_ + panel * R_ * lanes;
              for (int64_t i = 0; i < R_ * lanes; ++i) sums[i] += addend[i];
            }
            const int64_t first = panel * lanes, last = std::min(W_, first + lanes);
            for (int64_t r = 0; r < R_; ++r) {
              for (int64_t w = first; w < last; ++w) {
                data[r * stride_r + w * stride_w] = static_cast<T>(sums[r * lanes + w - first]);
              }
            }
          }
        });
  }

  int64_t chunks_, R_, W_, size_;
  Buffer buffer_;
};

}  // namespace modxfer

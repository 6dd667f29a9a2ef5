// LoRA linears on a CPU: what a frozen linear's GEMM does not do, in one pass over the rows. dtype
// and thread handling around the kernels of lora_linear_isa.cpp.
//
// M rows   K, N widths   R rank   T targets; notation of kernels/lora_linear/op.py
//
//   forward    x -> mask bits, s and y = bias + residual + s B^T, on which the base GEMM adds
//   backward   dy -> ds and dB; x, ds -> dA and dx = mask(ds A), on which the base GEMM adds
//
// A block of rows passes through all of it while it is in the second cache. Neither mask(x) nor
// ds leaves the block. Gradients of adapters are summed over fixed chunks of rows and then over the
// chunks, whichever thread took which: the same bits for any number of threads.

#include "modxfer/lora_linear.h"

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <new>
#include <vector>

#include "modxfer/ops.h"
#include "rows.h"

namespace modxfer {
namespace {

using torch::headeronly::ScalarType;

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

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t panel_size(int64_t R, int64_t width) {
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
Buffer pack(const Tensor& source, int64_t R, int64_t W, int64_t stride_r, int64_t stride_w) {
  Buffer panels(panel_size(R, W));
  switch (source.scalar_type()) {
    case ScalarType::Float:
      pack_as<float>(source, R, W, stride_r, stride_w, panels.data());
      break;
    case ScalarType::BFloat16:
      pack_as<c10::BFloat16>(source, R, W, stride_r, stride_w, panels.data());
      break;
    case ScalarType::Half:
      pack_as<c10::Half>(source, R, W, stride_r, stride_w, panels.data());
      break;
    default:
      STD_TORCH_CHECK(false, "adapters: expected float32, bfloat16 or float16");
  }
  return panels;
}

Buffer pack_a(const Tensor& a) { return pack(a, a.size(0), a.size(1), a.stride(0), a.stride(1)); }

Buffer pack_b(const Tensor& b) { return pack(b, b.size(1), b.size(0), b.stride(1), b.stride(0)); }

// Blocks of rows of a tensor as fp32: in place for fp32, otherwise through a buffer of its own.
class RowBlock {
 public:
  RowBlock(const Tensor& tensor, int64_t max_rows)
      : rows_(tensor),
        width_(tensor.size(1)),
        data_(static_cast<float*>(tensor.data_ptr())),
        stride_(rows_.is_float() ? tensor.stride(0) : tensor.size(1)),
        buffer_(rows_.buffer_size() * max_rows) {}

  Matrix read(int64_t first, int64_t rows) {
    if (rows_.is_float()) return {data_ + first * stride_, stride_};
    for (int64_t row = 0; row < rows; ++row) {
      rows_.read(first + row, buffer_.data() + row * width_);
    }
    return {buffer_.data(), stride_};
  }

  // Where to write rows; `commit` them afterwards.
  float* target(int64_t first) {
    return rows_.is_float() ? data_ + first * stride_ : buffer_.data();
  }
  void commit(int64_t first, int64_t rows) {
    for (int64_t row = 0; row < rows; ++row) {
      rows_.commit(first + row, buffer_.data() + row * width_);
    }
  }
  int64_t stride() const { return stride_; }

 private:
  Rows rows_;
  int64_t width_;
  float* data_;
  int64_t stride_;
  Buffer buffer_;
};

using RowBlocks = std::vector<RowBlock>;

RowBlocks row_blocks(const std::vector<Tensor>& tensors, int64_t max_rows) {
  RowBlocks blocks;
  for (const Tensor& tensor : tensors) blocks.emplace_back(tensor, max_rows);
  return blocks;
}

// Rows whose fp32 values take about an eighth of a second cache of 1 MiB.
int64_t rows_per_block(int64_t width) {
  return std::clamp<int64_t>(32768 / std::max<int64_t>(width, 1), 8, 32);
}

// Rows whose gradients are summed apart: at most 32 chunks, so that their sums stay small beside x.
int64_t rows_per_chunk(int64_t M) {
  return std::max<int64_t>(128, ceil_div(ceil_div(M, 32), 32) * 32);
}

std::vector<int64_t> rank_offsets(const std::vector<Tensor>& lora_a) {
  std::vector<int64_t> offsets{0};
  for (const Tensor& a : lora_a) offsets.push_back(offsets.back() + a.size(0));
  return offsets;
}

// Bits of the targets of a tensor [T, M, words]; nothing for a target that drops nothing.
class Masks {
 public:
  Masks(const std::optional<Tensor>& bits, const std::vector<int64_t>& thresholds)
      : thresholds_(thresholds) {
    if (!bits.has_value()) return;
    STD_TORCH_CHECK(bits->scalar_type() == ScalarType::Int && bits->is_contiguous() &&
                        bits->dim() == 3 &&
                        bits->size(0) == static_cast<int64_t>(thresholds.size()),
                    "bits: expected contiguous int32 [T, M, words]");
    words_ = static_cast<uint32_t*>(bits->data_ptr());
    rows_ = bits->size(1);
    num_words_ = bits->size(2);
  }

  Mask at(size_t target, int64_t row) const {
    return thresholds_[target] == 0 ? Mask{nullptr, 0} : Mask{words(target, row), num_words_};
  }

  void draw(uint64_t seed, size_t target, int64_t row, int64_t rows) const {
    if (thresholds_[target] == 0) {
      std::fill_n(words(target, row), rows * num_words_, ~uint32_t{0});
      return;
    }
    const DropoutKey key{seed, static_cast<uint32_t>(target),
                         static_cast<uint32_t>(thresholds_[target])};
    lora_kernels().draw_mask(key, row, rows, num_words_, words(target, row), num_words_);
  }

  bool given() const { return words_ != nullptr; }

 private:
  uint32_t* words(size_t target, int64_t row) const {
    return words_ + (static_cast<int64_t>(target) * rows_ + row) * num_words_;
  }

  const std::vector<int64_t>& thresholds_;
  uint32_t* words_ = nullptr;
  int64_t rows_ = 0, num_words_ = 0;
};

void add_rows(Matrix addend, int64_t rows, int64_t width, float* y, int64_t stride) {
  for (int64_t row = 0; row < rows; ++row) {
    const float* source = addend.data + row * addend.stride;
    float* target = y + row * stride;
    for (int64_t i = 0; i < width; ++i) target[i] += source[i];
  }
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
      case ScalarType::Float:
        return write_as<float>(out, stride_r, stride_w);
      case ScalarType::BFloat16:
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

}  // namespace

Tensor lora_shrink(Tensor x, Tensor lora_a, double scale) {
  const int64_t M = x.size(0), K = x.size(1), R = lora_a.size(0);
  STD_TORCH_CHECK(lora_a.dim() == 2 && lora_a.size(1) == K, "lora_a: expected [R, K]");
  const Buffer panels = pack_a(lora_a);
  Tensor s = torch::stable::new_empty(x, {M, R}, ScalarType::Float);
  auto* s_data = static_cast<float*>(s.data_ptr());
  const int64_t block = rows_per_block(K);
  torch::stable::parallel_for(0, ceil_div(M, block), 1, [&](int64_t begin, int64_t end) {
    RowBlock x_rows(x, block);
    for (int64_t first = begin * block; first < std::min(M, end * block); first += block) {
      const int64_t rows = std::min(block, M - first);
      lora_kernels().shrink(x_rows.read(first, rows), Mask{nullptr, 0}, rows, K, panels.data(), R,
                            static_cast<float>(scale), s_data + first * R, R);
    }
  });
  return s;
}

void lora_linear_rows_fwd(Tensor x, std::vector<Tensor> lora_a, std::vector<Tensor> lora_b,
                          std::vector<std::optional<Tensor>> biases, std::optional<Tensor> residual,
                          std::vector<double> scales, std::vector<int64_t> thresholds,
                          std::optional<Tensor> seed, std::optional<Tensor> bits, Tensor s,
                          std::vector<Tensor> ys) {
  const int64_t M = x.size(0), K = x.size(1);
  const size_t T = lora_a.size();
  const LoraKernels& kernels = lora_kernels();
  const std::vector<int64_t> offsets = rank_offsets(lora_a);
  const int64_t s_width = offsets.back();
  const Masks masks(bits, thresholds);
  const uint64_t key = seed.has_value() ? *static_cast<const uint64_t*>(seed->data_ptr()) : 0;

  std::vector<Buffer> a_panels, b_panels;
  std::vector<std::vector<float>> bias_rows(T);
  for (size_t t = 0; t < T; ++t) {
    a_panels.push_back(pack_a(lora_a[t]));
    b_panels.push_back(pack_b(lora_b[t]));
    if (!biases[t].has_value()) continue;
    Tensor row = torch::stable::view(*biases[t], {1, biases[t]->numel()});
    bias_rows[t].resize(row.numel());
    std::copy_n(Rows(row).read(0, bias_rows[t].data()), row.numel(), bias_rows[t].data());
  }

  const int64_t block = rows_per_block(K);
  torch::stable::parallel_for(0, ceil_div(M, block), 1, [&](int64_t begin, int64_t end) {
    RowBlock x_rows(x, block), s_rows(s, block);
    RowBlocks y_rows = row_blocks(ys, block);
    RowBlocks residual_rows = row_blocks(
        residual.has_value() ? std::vector<Tensor>{*residual} : std::vector<Tensor>{}, block);
    for (int64_t first = begin * block; first < std::min(M, end * block); first += block) {
      const int64_t rows = std::min(block, M - first);
      const Matrix x_block = x_rows.read(first, rows);
      float* s_block = s_rows.target(first);
      for (size_t t = 0; t < T; ++t) {
        const int64_t N = lora_b[t].size(0), R = lora_a[t].size(0);
        if (masks.given()) masks.draw(key, t, first, rows);
        kernels.shrink(x_block, masks.at(t, first), rows, K, a_panels[t].data(), R,
                       static_cast<float>(scales[t]), s_block + offsets[t], s_width);
        float* y = y_rows[t].target(first);
        const int64_t y_stride = y_rows[t].stride();
        Matrix init{biases[t].has_value() ? bias_rows[t].data() : nullptr, 0};
        if (residual.has_value()) init = residual_rows[0].read(first, rows);
        kernels.expand({s_block + offsets[t], s_width}, rows, R, b_panels[t].data(), N,
                       Mask{nullptr, 0}, init, y, y_stride);
        if (residual.has_value() && biases[t].has_value()) {
          add_rows({bias_rows[t].data(), 0}, rows, N, y, y_stride);
        }
        y_rows[t].commit(first, rows);
      }
      s_rows.commit(first, rows);
    }
  });
}

void lora_linear_rows_bwd(std::vector<Tensor> dys, std::optional<Tensor> x,
                          std::vector<Tensor> lora_a, std::vector<Tensor> lora_b,
                          std::vector<double> scales, std::vector<int64_t> thresholds,
                          std::optional<Tensor> s, std::optional<Tensor> bits,
                          std::optional<Tensor> dx, std::vector<std::optional<Tensor>> da,
                          std::vector<std::optional<Tensor>> db) {
  const int64_t M = dys[0].size(0), K = lora_a[0].size(1);
  const size_t T = lora_a.size();
  const LoraKernels& kernels = lora_kernels();
  const std::vector<int64_t> offsets = rank_offsets(lora_a);
  const int64_t s_width = offsets.back();
  const Masks masks(bits, thresholds);

  const int64_t chunk_rows = rows_per_chunk(M), chunks = ceil_div(M, chunk_rows);
  std::vector<Buffer> a_panels, b_panels;
  std::vector<OuterSums> da_sums, db_sums;
  int64_t widest = K;
  bool any_da = false, any_db = false;
  for (size_t t = 0; t < T; ++t) {
    const int64_t N = lora_b[t].size(0), R = lora_a[t].size(0);
    a_panels.push_back(dx.has_value() ? pack_a(lora_a[t]) : Buffer(0));
    b_panels.push_back(dx.has_value() || da[t].has_value() ? pack_b(lora_b[t]) : Buffer(0));
    da_sums.emplace_back(da[t].has_value() ? chunks : 0, R, K);
    db_sums.emplace_back(db[t].has_value() ? chunks : 0, R, N);
    any_da |= da[t].has_value();
    any_db |= db[t].has_value();
    widest = std::max(widest, N);
  }

  const int64_t block = rows_per_block(widest);
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    RowBlocks dy_rows = row_blocks(dys, block);
    RowBlocks x_rows = row_blocks(any_da ? std::vector<Tensor>{*x} : std::vector<Tensor>{}, block);
    RowBlocks s_rows = row_blocks(any_db ? std::vector<Tensor>{*s} : std::vector<Tensor>{}, block);
    RowBlocks dx_rows =
        row_blocks(dx.has_value() ? std::vector<Tensor>{*dx} : std::vector<Tensor>{}, block);
    const Buffer ds(block * s_width);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t chunk_first = chunk * chunk_rows, last = std::min(M, chunk_first + chunk_rows);
      for (int64_t first = chunk_first; first < last; first += block) {
        const int64_t rows = std::min(block, last - first);
        const Matrix s_block = any_db ? s_rows[0].read(first, rows) : Matrix{nullptr, 0};
        for (size_t t = 0; t < T; ++t) {
          const int64_t N = lora_b[t].size(0), R = lora_a[t].size(0);
          const bool needs_ds = dx.has_value() || da[t].has_value();
          if (!needs_ds && !db[t].has_value()) continue;
          const Matrix dy = dy_rows[t].read(first, rows);
          if (needs_ds) {
            kernels.shrink(dy, Mask{nullptr, 0}, rows, N, b_panels[t].data(), R,
                           static_cast<float>(scales[t]), ds.data() + offsets[t], s_width);
          }
          if (db[t].has_value()) {
            kernels.outer({s_block.data + offsets[t], s_block.stride}, dy, Mask{nullptr, 0}, rows,
                          R, N, first != chunk_first, db_sums[t].chunk(chunk));
          }
        }
        if (any_da) {
          const Matrix x_block = x_rows[0].read(first, rows);
          for (size_t t = 0; t < T; ++t) {
            if (!da[t].has_value()) continue;
            kernels.outer({ds.data() + offsets[t], s_width}, x_block, masks.at(t, first), rows,
                          lora_a[t].size(0), K, first != chunk_first, da_sums[t].chunk(chunk));
          }
        }
        if (dx.has_value()) {
          float* target = dx_rows[0].target(first);
          const int64_t stride = dx_rows[0].stride();
          for (size_t t = 0; t < T; ++t) {
            kernels.expand({ds.data() + offsets[t], s_width}, rows, lora_a[t].size(0),
                           a_panels[t].data(), K, masks.at(t, first),
                           {t == 0 ? nullptr : target, stride}, target, stride);
          }
          dx_rows[0].commit(first, rows);
        }
      }
    }
  });
  for (size_t t = 0; t < T; ++t) {
    if (da[t].has_value()) da_sums[t].write(*da[t], da[t]->stride(0), da[t]->stride(1));
    if (db[t].has_value()) db_sums[t].write(*db[t], db[t]->stride(1), db[t]->stride(0));
  }
}

}  // namespace modxfer

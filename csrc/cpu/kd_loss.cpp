// KD loss rows on a CPU: dtype and thread handling around the row kernels of kd_loss_isa.cpp.

#include "modxfer/kd_loss.h"

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "bent_rows.h"
#include "labels.h"
#include "modxfer/kd_spec.h"
#include "modxfer/ops.h"

namespace modxfer {
namespace {

using torch::headeronly::ScalarType;

// Where the by-products of rows go, [M, 1] (lse alone) or [M, 6], or nowhere.
class Extras {
 public:
  Extras(const std::optional<Tensor>& extras, int64_t rows) {
    if (!extras.has_value()) return;
    STD_TORCH_CHECK(extras->scalar_type() == ScalarType::Float && extras->is_contiguous() &&
                        extras->dim() == 2 && extras->size(0) == rows &&
                        (extras->size(1) == 1 || extras->size(1) == kAll),
                    "extras: expected contiguous float32 [M, 1] or [M, 6]");
    data_ = static_cast<float*>(extras->data_ptr());
    width_ = extras->size(1);
  }

  bool has_all() const { return width_ == kAll; }
  KdExtras* room(KdExtras& own) const { return data_ == nullptr ? nullptr : &own; }

  void put(int64_t row, const KdExtras& own) const {
    std::copy_n(reinterpret_cast<const float*>(&own), width_, data_ + row * width_);
  }

 private:
  static constexpr int64_t kAll = sizeof(KdExtras) / sizeof(float);
  float* data_ = nullptr;
  int64_t width_ = 0;
};

void check_same_shape(const Tensor& student, const Tensor& other) {
  STD_TORCH_CHECK(
      other.dim() == 2 && other.size(0) == student.size(0) && other.size(1) == student.size(1),
      "logits: expected student, teacher and dlogits of one shape");
}

void check_per_row(const Tensor& tensor, int64_t numel) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float && tensor.is_contiguous() &&
                      tensor.numel() == numel,
                  "row_weights, stats: expected contiguous float32, one entry a row");
}

Tensor empty_fp32(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return torch::stable::new_empty(like, sizes, ScalarType::Float);
}

constexpr int64_t kStats = sizeof(KdStats) / sizeof(float);

float* floats(const Tensor& tensor) { return static_cast<float*>(tensor.data_ptr()); }

// Rows a thread takes at least: about 64k logits.
int64_t grain(int64_t vocab_size) {
  return std::max<int64_t>(1, 65536 / std::max<int64_t>(vocab_size, 1));
}

// What a thread holds: the scratch of the row kernels, and fp32 copies of half-precision rows.
class Buffers {
 public:
  Buffers(int64_t vocab_size, const BentRows& student, const BentRows& teacher,
          int64_t dlogits_size = 0)
      : scratch_(2 * vocab_size),
        student(student.buffer_size()),
        teacher(teacher.buffer_size()),
        dlogits(dlogits_size),
        vocab_size_(vocab_size) {}

  KdScratch scratch() {
    float* q = scratch_.data();
    return {q, q + vocab_size_};
  }

 private:
  std::vector<float> scratch_;

 public:
  std::vector<float> student, teacher, dlogits;

 private:
  int64_t vocab_size_;
};

void write_row(const KdRowKernels& kernels, const BentRows& logits, const Rows& dlogits,
               int64_t row, const float* student, int64_t V, int64_t label, float row_weight,
               const KdSpec& spec, const KdStats& stats, const KdScratch& scratch,
               std::vector<float>& buffer) {
  float* target = dlogits.target(row, buffer.data());
  if (row_weight == 0.0f) {
    std::fill_n(target, V, 0.0f);  // an ignored row may hold anything, NaN included
  } else {
    kernels.grad(student, V, label, row_weight, spec, stats, scratch, target);
    logits.unbend(student, target);
  }
  dlogits.commit(row, target);
}

// dlogits of all rows, from their statistics.
void write_rows(const Tensor& student_logits, const Tensor& teacher_logits, const Labels& label,
                const Tensor& row_weights, const Tensor& stats, const Spec& owner,
                const std::vector<double>& bends, const Biases& biases, const Tensor& dlogits) {
  const int64_t M = student_logits.size(0), V = student_logits.size(1);
  const KdSpec& spec = owner;
  const KdRowKernels& kernels = kd_row_kernels(spec.divergence);
  const Bends of(bends, biases, V);
  const BentRows student(student_logits, of.student), teacher(teacher_logits, of.teacher);
  const Rows grad(dlogits);
  check_same_shape(student_logits, teacher_logits);
  check_same_shape(student_logits, dlogits);
  check_per_row(row_weights, M);
  const int64_t more = num_numbers(spec.divergence);
  STD_TORCH_CHECK(stats.dim() == 2 && (stats.size(1) == kStats || stats.size(1) == kStats + more),
                  "stats: expected [M, 6], or the numbers of the whole row behind them");
  const int64_t width = stats.size(1);
  check_per_row(stats, width * M);
  const float* stats_rows = floats(stats);
  const float* weights = floats(row_weights);
  torch::stable::parallel_for(0, M, grain(V), [&](int64_t begin, int64_t end) {
    Buffers buffers(V, student, teacher, grad.buffer_size());
    KdScratch scratch = buffers.scratch();
    for (int64_t row = begin; row < end; ++row) {
      const float* z_s = student.read(row, buffers.student.data());
      const float* z_t = teacher.read(row, buffers.teacher.data());
      const float* at = stats_rows + row * width;
      const auto& of_softmax = *reinterpret_cast<const KdStats*>(at);
      const float* of_whole = width == kStats ? nullptr : at + kStats;
      const KdSpec own = owner.of_row(row);
      kernels.recompute(z_s, z_t, V, own, of_softmax, of_whole, scratch);
      write_row(kernels, student, grad, row, z_s, V, label[row], weights[row], own, of_softmax,
                scratch, buffers.dlogits);
    }
  });
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> kd_loss_fwd(
    Tensor student_logits, Tensor teacher_logits, std::optional<Tensor> labels,
    std::vector<int64_t> divergences, std::vector<double> numbers, std::vector<double> bends,
    Biases biases, std::optional<Tensor> softening, std::optional<Tensor> extras) {
  const int64_t M = student_logits.size(0), V = student_logits.size(1);
  const Spec owner(divergences, numbers, V, softening, M);
  const KdSpec& spec = owner;
  const KdRowKernels& kernels = kd_row_kernels(spec.divergence);
  const Bends of(bends, biases, V);
  const BentRows student(student_logits, of.student), teacher(teacher_logits, of.teacher);
  const Labels label(labels, M, V);
  const Extras more(extras, M);
  const auto fwd = kernels.fwd[more.has_all() || spec.label_smoothing != 0.0f];
  check_same_shape(student_logits, teacher_logits);
  Tensor kd = empty_fp32(student_logits, {M}), ce = empty_fp32(student_logits, {M});
  Tensor stats = empty_fp32(student_logits, {M, 6});
  auto* stats_rows = reinterpret_cast<KdStats*>(floats(stats));
  float *kd_rows = floats(kd), *ce_rows = floats(ce);
  torch::stable::parallel_for(0, M, grain(V), [&](int64_t begin, int64_t end) {
    Buffers buffers(V, student, teacher);
    KdScratch scratch = buffers.scratch();
    for (int64_t row = begin; row < end; ++row) {
      KdExtras extra;
      KdExtras* room = more.room(extra);
      const KdLosses losses =
          fwd(student.read(row, buffers.student.data()), teacher.read(row, buffers.teacher.data()),
              V, label[row], owner.of_row(row), stats_rows[row], scratch, room);
      if (room != nullptr) more.put(row, extra);
      kd_rows[row] = losses.kd;
      ce_rows[row] = losses.ce;
    }
  });
  return {kd, ce, stats};
}

void kd_loss_bwd(Tensor student_logits, Tensor teacher_logits, std::optional<Tensor> labels,
                 Tensor row_weights, Tensor stats, std::vector<int64_t> divergences,
                 std::vector<double> numbers, std::vector<double> bends, Biases biases,
                 std::optional<Tensor> softening, Tensor dlogits) {
  const int64_t M = student_logits.size(0), V = student_logits.size(1);
  write_rows(student_logits, teacher_logits, Labels(labels, M, V), row_weights, stats,
             Spec(divergences, numbers, V, softening, M), bends, biases, dlogits);
}

std::tuple<Tensor, Tensor> kd_loss_fwd_bwd(Tensor student_logits, Tensor teacher_logits,
                                           std::optional<Tensor> labels, Tensor row_weights,
                                           std::vector<int64_t> divergences,
                                           std::vector<double> numbers, std::vector<double> bends,
                                           Biases biases, std::optional<Tensor> softening,
                                           Tensor dlogits, std::optional<Tensor> extras) {
  const int64_t M = student_logits.size(0), V = student_logits.size(1);
  const Spec owner(divergences, numbers, V, softening, M);
  const KdSpec& spec = owner;
  const KdRowKernels& kernels = kd_row_kernels(spec.divergence);
  const Bends of(bends, biases, V);
  const BentRows student(student_logits, of.student), teacher(teacher_logits, of.teacher);
  const Rows grad(dlogits);
  const Labels label(labels, M, V);
  check_same_shape(student_logits, teacher_logits);
  check_same_shape(student_logits, dlogits);
  check_per_row(row_weights, M);
  const Extras more(extras, M);
  const auto fwd = kernels.fwd[more.has_all() || spec.label_smoothing != 0.0f];
  Tensor kd = empty_fp32(student_logits, {M}), ce = empty_fp32(student_logits, {M});
  float *kd_rows = floats(kd), *ce_rows = floats(ce);
  const float* weights = floats(row_weights);
  torch::stable::parallel_for(0, M, grain(V), [&](int64_t begin, int64_t end) {
    Buffers buffers(V, student, teacher, grad.buffer_size());
    KdScratch scratch = buffers.scratch();
    for (int64_t row = begin; row < end; ++row) {
      const float* z_s = student.read(row, buffers.student.data());
      const float* z_t = teacher.read(row, buffers.teacher.data());
      KdStats stats;
      KdExtras extra;
      KdExtras* room = more.room(extra);
      const KdSpec own = owner.of_row(row);
      const KdLosses losses = fwd(z_s, z_t, V, label[row], own, stats, scratch, room);
      if (room != nullptr) more.put(row, extra);
      kd_rows[row] = losses.kd;
      ce_rows[row] = losses.ce;
      write_row(kernels, student, grad, row, z_s, V, label[row], weights[row], own, stats, scratch,
                buffers.dlogits);
    }
  });
  return {kd, ce};
}

#include "kd_loss_stages.h"

// --- a teacher that lists a few classes

namespace {

// The rows of such a teacher; an id outside [0, V) is absent.
class TopKRows {
 public:
  TopKRows(const Tensor& ids, const Tensor& log_probs, const std::optional<Tensor>& log_tail,
           int64_t tail, double missing, int64_t rows, int64_t vocab_size)
      : is_wide_(ids.scalar_type() == ScalarType::Long),
        ids_(ids.data_ptr()),
        log_probs_(floats(log_probs)),
        width_(ids.size(1)),
        vocab_size_(vocab_size),
        tail_(static_cast<TopKTail>(tail)),
        missing_(static_cast<float>(missing)) {
    STD_TORCH_CHECK(ids.dim() == 2 && ids.size(0) == rows && ids.is_contiguous() &&
                        (is_wide_ || ids.scalar_type() == ScalarType::Int),
                    "ids: expected contiguous int64 or int32 of [M, K]");
    STD_TORCH_CHECK(0 <= tail && tail < static_cast<int64_t>(TopKTail::kCount),
                    "tail: expected one that these C++ kernels were built with");
    check_per_row(log_probs, rows * width_);
    if (tail_ != TopKTail::kBucket) return;
    STD_TORCH_CHECK(log_tail.has_value(), "log_tail: expected one a row");
    check_per_row(*log_tail, rows);
    log_tail_ = floats(*log_tail);
  }

  int64_t width() const { return width_; }

  // Those of a row that are there, in buffers of `width` each.
  TopKRow read(int64_t row, int64_t* ids, float* log_p) const {
    int64_t count = 0;
    for (int64_t k = row * width_; k < (row + 1) * width_; ++k) {
      const int64_t id = is_wide_ ? static_cast<const int64_t*>(ids_)[k]
                                  : int64_t{static_cast<const int32_t*>(ids_)[k]};
      if (id < 0 || id >= vocab_size_) continue;
      ids[count] = id;
      log_p[count++] = log_probs_[k];
    }
    return {ids, log_p, count, log_tail_ == nullptr ? 0.0f : log_tail_[row], tail_, missing_};
  }

 private:
  bool is_wide_;
  const void* ids_;
  const float* log_probs_;
  const float* log_tail_ = nullptr;
  int64_t width_;
  int64_t vocab_size_;
  TopKTail tail_;
  float missing_;
};

// What a thread holds for them.
class TopKBuffers {
 public:
  TopKBuffers(int64_t vocab_size, int64_t width, const BentRows& student, int64_t dlogits_size = 0)
      : others_(2 * vocab_size),
        list_(7 * (width + 1)),
        student(student.buffer_size()),
        dlogits(dlogits_size),
        ids(width),
        log_p(width),
        vocab_size_(vocab_size),
        width_(width + 1) {}

  TopKScratch scratch() {
    float *e = others_.data(), *z = list_.data();
    const int64_t w = width_;
    return {e, e + vocab_size_, z, z + w, z + 2 * w, z + 3 * w, z + 4 * w, z + 5 * w, z + 6 * w};
  }

 private:
  std::vector<float> others_, list_;

 public:
  std::vector<float> student, dlogits;
  std::vector<int64_t> ids;
  std::vector<float> log_p;

 private:
  int64_t vocab_size_, width_;
};

}  // namespace

std::tuple<Tensor, Tensor> topk_kd_loss(
    Tensor student_logits, Tensor ids, Tensor log_probs, std::optional<Tensor> log_tail,
    int64_t tail, double missing, std::optional<Tensor> labels, std::optional<Tensor> row_weights,
    std::vector<int64_t> divergences, std::vector<double> numbers, std::vector<double> bends,
    Biases biases, std::optional<Tensor> softening, std::optional<Tensor> dlogits,
    std::optional<Tensor> extras) {
  const int64_t M = student_logits.size(0), V = student_logits.size(1);
  const Spec owner(divergences, numbers, V, softening, M);
  const KdSpec& spec = owner;
  const KdRowKernels& kernels = kd_row_kernels(spec.divergence);
  STD_TORCH_CHECK(kernels.topk_fwd != nullptr, "divergences: expected one of probabilities");
  STD_TORCH_CHECK(
      static_cast<int64_t>(spec.divergence) < kNumSums || spec.divergence == Divergence::kCount ||
          tail == static_cast<int64_t>(TopKTail::kBucket),
      "tail: expected a bucket beside a divergence that is a function of sums over the row");
  const BentRows student(student_logits, Bends(bends, biases, V).student);
  const Rows grad(dlogits.value_or(student_logits));
  const TopKRows teacher(ids, log_probs, log_tail, tail, missing, M, V);
  const Labels label(labels, M, V);
  float* lse_rows = nullptr;
  if (extras.has_value()) {
    check_per_row(*extras, M);
    lse_rows = floats(*extras);
  }
  const float* weights = nullptr;
  if (dlogits.has_value()) {
    check_same_shape(student_logits, *dlogits);
    STD_TORCH_CHECK(row_weights.has_value(), "row_weights: expected them beside dlogits");
    check_per_row(*row_weights, M);
    weights = floats(*row_weights);
  }
  Tensor kd = empty_fp32(student_logits, {M}), ce = empty_fp32(student_logits, {M});
  float *kd_rows = floats(kd), *ce_rows = floats(ce);
  torch::stable::parallel_for(0, M, grain(V), [&](int64_t begin, int64_t end) {
    TopKBuffers buffers(V, teacher.width(), student, weights == nullptr ? 0 : grad.buffer_size());
    const TopKScratch scratch = buffers.scratch();
    for (int64_t row = begin; row < end; ++row) {
      const float* z = student.read(row, buffers.student.data());
      const TopKRow of_row = teacher.read(row, buffers.ids.data(), buffers.log_p.data());
      TopKStats stats;
      float* lse = lse_rows == nullptr ? nullptr : lse_rows + row;
      const KdSpec own = owner.of_row(row);
      const KdLosses losses = kernels.topk_fwd(z, V, of_row, label[row], own, stats, scratch, lse);
      kd_rows[row] = losses.kd;
      ce_rows[row] = losses.ce;
      if (weights == nullptr) continue;
      float* target = grad.target(row, buffers.dlogits.data());
      if (weights[row] == 0.0f) {
        std::fill_n(target, V, 0.0f);  // an ignored row may hold anything, NaN included
      } else {
        kernels.topk_grad(z, V, of_row, label[row], weights[row], own, stats, scratch, target);
        student.unbend(z, target);
      }
      grad.commit(row, target);
    }
  });
  return {kd, ce};
}

}  // namespace modxfer

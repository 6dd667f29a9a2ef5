// The K largest logits of rows on a CPU: the selection around the passes of teacher_topk_isa.cpp.

#include "modxfer/teacher_topk.h"

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <vector>

#include "bent_rows.h"
#include "modxfer/ops.h"
#include "rows.h"

namespace modxfer {
namespace {

using torch::headeronly::ScalarType;

constexpr float kLog2E = 1.44269504f;
// Groups of logits for each that is wanted: of random logits 1.15 K reach the bound of their
// maxima.
constexpr int64_t kGroups = 4;

// In the order of logits, larger ones above; of equal ones the lower index.
uint64_t key_of(float logit, int32_t index) {
  const float value = logit + 0.0f;  // -0 is 0
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  bits ^= bits >> 31 ? 0xFFFFFFFFu : 0x80000000u;
  return uint64_t{bits} << 32 | ~static_cast<uint32_t>(index);
}

int32_t index_of(uint64_t key) { return static_cast<int32_t>(~static_cast<uint32_t>(key)); }

// Where a row's results go.
struct Found {
  int32_t* ids;      // [K]
  float* log_probs;  // [K]
  float* log_tail;
};

// A thread's room for a row of V logits.
class Selection {
 public:
  Selection(int64_t V, int64_t K, const Bend& bend, float inv_temperature)
      : V_(V), K_(K), bend_(bend), inv_temperature_(inv_temperature) {
    const int64_t lanes = kernels_.lanes, wanted = (kGroups * K + lanes - 1) / lanes;
    vectors_ = std::max<int64_t>(1, V / (wanted * lanes));
    maxima_.resize((V / (vectors_ * lanes) + 1) * lanes);
    indices_.resize(V + 1);
    keys_.reserve(V);
    if (!bend.is_identity()) z_.resize(V);
  }

  void find(const float* logits, const Found& found) {
    const float* z = logits;
    if (!bend_.is_identity()) {
      bend_row_kernels().bend(logits, V_, bend_, z_.data());
      z = z_.data();
    }
    const int64_t groups = kernels_.maxima(logits, V_, vectors_, maxima_.data());
    float top = *std::max_element(maxima_.begin(), maxima_.begin() + groups);
    const float bound = bound_of(groups);
    if (!bend_.is_identity()) bend_row_kernels().bend(&top, 1, bend_, &top);
    double rest;
    const int64_t count = kernels_.collect(logits, z, V_, bound, top, inv_temperature_ * kLog2E,
                                           indices_.data(), rest);
    keys_.clear();
    for (int64_t i = 0; i < count; ++i) keys_.push_back(key_of(logits[indices_[i]], indices_[i]));
    const int64_t chosen = std::min(count, K_);
    if (chosen < count) {
      std::nth_element(keys_.begin(), keys_.begin() + chosen, keys_.end(), std::greater<>());
    }
    std::sort(keys_.begin(), keys_.begin() + chosen, std::greater<>());
    const auto x_of = [&](int64_t i) {
      return (static_cast<double>(z[index_of(keys_[i])]) - top) * inv_temperature_;
    };
    for (int64_t i = chosen; i < count; ++i) rest += std::exp(x_of(i));
    double d = rest;
    for (int64_t i = 0; i < chosen; ++i) d += std::exp(x_of(i));
    if (!(d > 0.0 && d < std::numeric_limits<double>::infinity())) return write_nothing(found);
    const double log_d = std::log(d);
    for (int64_t i = 0; i < K_; ++i) {
      found.ids[i] = i < chosen ? index_of(keys_[i]) : -1;
      found.log_probs[i] = i < chosen ? static_cast<float>(x_of(i) - log_d)
                                      : -std::numeric_limits<float>::infinity();
    }
    *found.log_tail = static_cast<float>(std::log(rest) - log_d);
  }

 private:
  // Reached by K logits or more, or else by all but -inf.
  float bound_of(int64_t groups) {
    const float least = std::numeric_limits<float>::lowest();
    if (groups < K_) return least;
    const auto at = maxima_.begin() + (K_ - 1);
    std::nth_element(maxima_.begin(), at, maxima_.begin() + groups, std::greater<>());
    return std::max(*at, least);
  }

  // Of a row without a softmax.
  void write_nothing(const Found& found) const {
    constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
    for (int64_t i = 0; i < K_; ++i) found.ids[i] = static_cast<int32_t>(i);
    std::fill_n(found.log_probs, K_, kNaN);
    *found.log_tail = kNaN;
  }

  const TopKKernels& kernels_ = topk_kernels();
  int64_t V_, K_, vectors_;
  Bend bend_;
  float inv_temperature_;
  std::vector<float> maxima_, z_;
  std::vector<int32_t> indices_;
  std::vector<uint64_t> keys_;
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor> teacher_topk(Tensor logits, int64_t k, std::vector<double> bends,
                                                double temperature) {
  const int64_t M = logits.size(0), V = logits.size(1);
  STD_TORCH_CHECK(0 < k && k <= V && V < std::numeric_limits<int32_t>::max(),
                  "k: expected a number of classes");
  const Rows rows(logits);
  const Bend bend = Bends(bends, {}, V).teacher;
  Tensor ids = torch::stable::new_empty(logits, {M, k}, ScalarType::Int);
  Tensor log_probs = torch::stable::new_empty(logits, {M, k}, ScalarType::Float);
  Tensor log_tail = torch::stable::new_empty(logits, {M}, ScalarType::Float);
  const Found found{static_cast<int32_t*>(ids.data_ptr()),
                    static_cast<float*>(log_probs.data_ptr()),
                    static_cast<float*>(log_tail.data_ptr())};
  const int64_t grain = std::max<int64_t>(1, 65536 / V);
  torch::stable::parallel_for(0, M, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> buffer(rows.buffer_size());
    Selection selection(V, k, bend, static_cast<float>(1.0 / temperature));
    for (int64_t row = begin; row < end; ++row) {
      selection.find(rows.read(row, buffer.data()),
                     {found.ids + row * k, found.log_probs + row * k, found.log_tail + row});
    }
  });
  return {ids, log_probs, log_tail};
}

}  // namespace modxfer

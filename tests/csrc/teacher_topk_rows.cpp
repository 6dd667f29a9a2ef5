// The passes over a row whose K largest logits are wanted, of every instruction set this processor
// has, against the definition.
//
// Built with AddressSanitizer: every row and every buffer is a heap block of exactly its values
// that begins at an address no vector is aligned to.

#include "teacher_topk_isa.cpp"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <limits>
#include <memory>
#include <random>
#include <vector>

namespace {

using modxfer::TopKKernels;

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kLog2E = 1.44269504f;
int failures = 0;

// Values whose first is 4 bytes past the start of a heap block and whose last ends it.
template <class T>
class Row {
 public:
  explicit Row(int64_t size) : block_(new T[size + 1]()), size_(size) {}
  T* data() { return block_.get() + 1; }
  T& operator[](int64_t i) { return data()[i]; }
  T* end() { return data() + size_; }

 private:
  std::unique_ptr<T[]> block_;
  int64_t size_;
};

void expect(bool is_right, const char* isa, const char* what, int64_t V) {
  if (is_right) return;
  ++failures;
  std::fprintf(stderr, "%s %s: V=%lld\n", isa, what, static_cast<long long>(V));
}

// The K-th largest maximum of groups bounds the K-th largest logit; the logits that reach it are
// found in their order, and the others summed.
void check_row(const TopKKernels& kernels, Row<float>& logits, int64_t V, int64_t K,
               int64_t vectors) {
  const int64_t size = vectors * kernels.lanes, groups = (V + size - 1) / size * kernels.lanes;
  Row<float> maxima(groups);
  expect(kernels.maxima(logits.data(), V, vectors, maxima.data()) == groups, kernels.isa, "groups",
         V);
  std::sort(maxima.data(), maxima.end(), std::greater<>());
  Row<float> ordered(V);
  std::copy(logits.data(), logits.end(), ordered.data());
  std::sort(ordered.data(), ordered.end(), std::greater<>());
  expect(maxima[0] == ordered[0], kernels.isa, "top", V);
  const float least = std::numeric_limits<float>::lowest();
  const float bound = K <= groups ? std::max(maxima[K - 1], least) : least;
  expect(bound <= std::max(ordered[K - 1], least), kernels.isa, "bound", V);

  const float rate = 0.5f;
  std::vector<int64_t> wanted;
  long double sum = 0;
  for (int64_t i = 0; i < V; ++i) {
    if (logits[i] >= bound) {
      wanted.push_back(i);
    } else {
      sum += std::exp(rate * (static_cast<long double>(logits[i]) - ordered[0]));
    }
  }
  Row<int32_t> indices(V + 1);
  double rest = -1.0;
  const int64_t count = kernels.collect(logits.data(), logits.data(), V, bound, ordered[0],
                                        rate * kLog2E, indices.data(), rest);
  expect(count == static_cast<int64_t>(wanted.size()) &&
             std::equal(wanted.begin(), wanted.end(), indices.data()),
         kernels.isa, "indices", V);
  expect(std::abs(rest - sum) <= 2e-6L * sum, kernels.isa, "rest", V);
}

}  // namespace

int main() {
  std::vector<int64_t> sizes;
  for (int64_t V = 1; V <= 49; ++V) sizes.push_back(V);  // every remainder of 16 lanes, thrice
  for (int64_t V : {127, 128, 129, 1023, 1024, 1025, 1043, 3001}) sizes.push_back(V);
  std::mt19937 random(0);
  std::normal_distribution<float> normal;
  for (modxfer::Isa isa : modxfer::kIsas) {
    if (!modxfer::has_isa(isa)) continue;
    modxfer::isa_in_use() = isa;
    const TopKKernels& kernels = modxfer::topk_kernels();
    int rows = 0;
    for (int64_t V : sizes) {
      for (float masked : {0.0f, 0.5f}) {
        Row<float> logits(V);
        for (int64_t i = 0; i < V; ++i) logits[i] = 3.0f * normal(random);
        for (int64_t i = 1; i < V; ++i) {
          if (normal(random) < masked - 0.5f) logits[i] = masked == 0.0f ? 1.25f : -kInf;
        }
        for (int64_t K : {int64_t{1}, (V + 8) / 9, V}) {
          for (int64_t vectors : {1, 3}) {
            check_row(kernels, logits, V, K, vectors);
            ++rows;
          }
        }
      }
    }
    std::printf("%s: %d rows\n", kernels.isa, rows);
  }
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}

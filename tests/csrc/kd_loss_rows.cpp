// Row kernels of every instruction set this processor has, against the definition in long double.
//
// Built with AddressSanitizer: every row and both scratch rows are heap blocks of exactly V floats
// that begin at an address no vector is aligned to.

#include "kd_loss_isa.cpp"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <random>
#include <vector>

namespace {

using modxfer::Divergence;
using modxfer::KdRowKernels;
using modxfer::KdSpec;
using Real = long double;

// vectors of every room are as wide as the registers of their set
static_assert(modxfer::baseline::kLanes == 4);
#ifdef MODXFER_X86_TARGETS
static_assert(modxfer::avx2::kLanes == 8 && modxfer::avx512::kLanes == 16);
#endif

// The divergences whose definition stands here, in `truth_of`.
constexpr Divergence kKnown[] = {Divergence::kForwardKl, Divergence::kReverseKl, Divergence::kJsd};
constexpr float kInf = std::numeric_limits<float>::infinity();
int failures = 0;

// V floats whose first is 4 bytes past the start of a heap block and whose last ends it.
class Row {
 public:
  explicit Row(int64_t V) : block_(new float[V + 1]), V_(V) {
    for (int64_t i = 0; i <= V; ++i) block_[i] = std::nanf("");
  }
  float* data() { return block_.get() + 1; }
  float& operator[](int64_t i) { return data()[i]; }
  void copy_from(Row& other) { std::copy_n(other.data(), V_, data()); }

 private:
  std::unique_ptr<float[]> block_;
  int64_t V_;
};

struct Truth {
  Real kd = 0, ce = 0;
  std::vector<Real> dlogits;
};

std::vector<Real> log_softmax(Row& z, int64_t V, Real inv_temperature) {
  Real top = -kInf, sum = 0;
  for (int64_t i = 0; i < V; ++i) top = std::max<Real>(top, z[i]);
  for (int64_t i = 0; i < V; ++i) sum += std::exp((z[i] - top) * inv_temperature);
  std::vector<Real> logs(V);
  for (int64_t i = 0; i < V; ++i) logs[i] = (z[i] - top) * inv_temperature - std::log(sum);
  return logs;
}

// a (log a - log b), 0 where a is 0
Real kl_term(Real log_a, Real log_b) {
  return std::isinf(log_a) ? 0 : std::exp(log_a) * (log_a - log_b);
}

Truth truth_of(Row& student, Row& teacher, int64_t V, int64_t label, float row_weight,
               const KdSpec& spec, Real beta) {
  const auto log_q = log_softmax(student, V, spec.inv_temperature);
  const auto log_p = log_softmax(teacher, V, spec.inv_temperature);
  const auto log_q1 = log_softmax(student, V, 1);
  Truth truth;
  truth.dlogits.resize(V);
  // dD/dz_i = (u_i - q_i sum u) / temperature with u = q dD/dq
  std::vector<Real> u(V);
  Real u_sum = 0;
  for (int64_t i = 0; i < V; ++i) {
    const Real p = std::exp(log_p[i]), q = std::exp(log_q[i]);
    if (spec.divergence == Divergence::kForwardKl) {
      truth.kd += kl_term(log_p[i], log_q[i]);
      u[i] = -p;
    } else if (spec.divergence == Divergence::kReverseKl) {
      truth.kd += kl_term(log_q[i], log_p[i]);
      u[i] = kl_term(log_q[i], log_p[i]);
    } else if (spec.divergence == Divergence::kJsd) {
      const Real log_m = std::log(beta * p + (1 - beta) * q);
      truth.kd += beta * kl_term(log_p[i], log_m) + (1 - beta) * kl_term(log_q[i], log_m);
      u[i] = (1 - beta) * kl_term(log_q[i], log_m);
    } else {
      std::abort();
    }
    u_sum += u[i];
  }
  const bool has_ce = label >= 0 && spec.ce_weight != 0;
  if (has_ce) truth.ce = -log_q1[label];
  for (int64_t i = 0; i < V; ++i) {
    Real dz = spec.kd_weight * spec.inv_temperature * (u[i] - std::exp(log_q[i]) * u_sum);
    if (has_ce) dz += spec.ce_weight * (std::exp(log_q1[i]) - (i == label ? 1 : 0));
    truth.dlogits[i] = row_weight * dz;
  }
  return truth;
}

void expect_near(float got, Real expected, Real tolerance, const char* isa, const char* what,
                 int64_t V, const KdSpec& spec) {
  if (std::abs(static_cast<Real>(got) - expected) <= tolerance) return;  // false for NaN
  ++failures;
  std::fprintf(stderr, "%s %s: V=%lld divergence=%d inv_temperature=%g: expected %.9Lg, got %.9g\n",
               isa, what, static_cast<long long>(V), static_cast<int>(spec.divergence),
               spec.inv_temperature, expected, got);
}

void check_row(const KdRowKernels& kernels, Row& student, Row& teacher, int64_t V, int64_t label,
               const KdSpec& spec, Real beta) {
  const float row_weight = 0.75f;
  const Truth truth = truth_of(student, teacher, V, label, row_weight, spec, beta);
  // logits reach 40 and log-probabilities 80: a few roundings of those
  const Real tolerance = 2e-5L;

  Row q(V), u(V), dlogits(V), in_place(V);
  modxfer::KdScratch scratch{q.data(), u.data()};
  modxfer::KdStats stats;
  modxfer::KdExtras extras;
  for (const bool has_extras : {true, false}) {
    const auto losses = kernels.fwd[has_extras](student.data(), teacher.data(), V, label, spec,
                                                stats, scratch, has_extras ? &extras : nullptr);
    expect_near(losses.kd, truth.kd, tolerance, kernels.isa, "kd", V, spec);
    expect_near(losses.ce, truth.ce, tolerance, kernels.isa, "ce", V, spec);
  }

  kernels.grad(student.data(), V, label, row_weight, spec, stats, scratch, dlogits.data());
  in_place.copy_from(student);
  kernels.grad(in_place.data(), V, label, row_weight, spec, stats, scratch, in_place.data());
  for (int64_t i = 0; i < V; ++i) {
    expect_near(dlogits[i], truth.dlogits[i], tolerance, kernels.isa, "dlogits", V, spec);
    expect_near(in_place[i], dlogits[i], 0, kernels.isa, "dlogits in place", V, spec);
  }

  Row q_again(V), u_again(V), dlogits_again(V);
  modxfer::KdScratch again{q_again.data(), u_again.data()};
  kernels.recompute(student.data(), teacher.data(), V, spec, stats, nullptr, again);
  kernels.grad(student.data(), V, label, row_weight, spec, stats, again, dlogits_again.data());
  for (int64_t i = 0; i < V; ++i) {
    expect_near(dlogits_again[i], truth.dlogits[i], tolerance, kernels.isa, "recomputed dlogits", V,
                spec);
  }
}

// Of every divergence, and of a sum of two: what is read and written stays inside of the rows, and
// what is made again from the statistics is what the forward left.
void check_reach(const KdRowKernels& kernels, Row& student, Row& teacher, int64_t V,
                 const KdSpec& spec) {
  Row q(V), u(V), dlogits(V), q_again(V), u_again(V), dlogits_again(V);
  modxfer::KdScratch scratch{q.data(), u.data()}, again{q_again.data(), u_again.data()};
  modxfer::KdStats stats;
  modxfer::KdExtras extras;
  kernels.fwd[1](student.data(), teacher.data(), V, V / 2, spec, stats, scratch, &extras);
  kernels.grad(student.data(), V, V / 2, 0.75f, spec, stats, scratch, dlogits.data());
  const auto expect_again = [&](const float* numbers) {
    kernels.recompute(student.data(), teacher.data(), V, spec, stats, numbers, again);
    kernels.grad(student.data(), V, V / 2, 0.75f, spec, stats, again, dlogits_again.data());
    for (int64_t i = 0; i < V; ++i) {
      const Real tolerance = 2e-5L * std::max<Real>(1, std::abs(dlogits[i]));
      expect_near(dlogits_again[i], dlogits[i], tolerance, kernels.isa, "dlogits again", V, spec);
    }
  };
  expect_again(nullptr);
  const std::unique_ptr<double[]> sums(new double[modxfer::num_sums(spec.divergence)]);
  kernels.sums(student.data(), teacher.data(), V, spec, stats, sums.get());
  // of the logits, what the ranks make of the sums where one of them has all classes
  if (spec.divergence == Divergence::kLogitsMse) {
    const float slope = static_cast<float>(2 / sums[1]);
    expect_again(&slope);
  } else if (spec.divergence == Divergence::kLogitsCosine) {
    const float numbers[] = {static_cast<float>(sums[0]), static_cast<float>(sums[1]),
                             static_cast<float>(sums[2])};
    expect_again(numbers);
  }
  for (const bool has_more : {true, false}) {
    modxfer::KdPart part;
    kernels.part[has_more](student.data(), teacher.data(), V, V, spec, part);  // another's label
  }
}

}  // namespace

int main() {
  std::vector<int64_t> sizes;
  for (int64_t V = 1; V <= 49; ++V) sizes.push_back(V);  // every remainder of 16 lanes, thrice
  for (int64_t V : {1023, 1024, 1025, 1039, 2047, 2049, 3001})
    sizes.push_back(V);  // blocks of 1024
  std::mt19937 random(0);
  std::normal_distribution<float> normal;
  for (modxfer::Isa isa : modxfer::kIsas) {
    if (!modxfer::has_isa(isa)) continue;
    modxfer::isa_in_use() = isa;
    int rows = 0;
    for (int64_t V : sizes) {
      for (float delta : {0.0f, 0.03f, 3.0f}) {
        Row student(V), teacher(V);
        for (int64_t i = 0; i < V; ++i) {
          teacher[i] = 4.0f * normal(random);
          student[i] = teacher[i] + delta * normal(random);
        }
        teacher[V / 2] += 20.0f;
        if (V > 8) student[V - 1] = teacher[V - 1] = student[3] = teacher[3] = -kInf;
        const float beta = 0.3f, mixture[] = {beta, 1.0f - beta, std::log(beta), std::log1p(-beta)};
        const auto spec_of = [&](Divergence divergence, float temperature) {
          return KdSpec{divergence,
                        mixture[0],
                        mixture[1],
                        mixture[2],
                        mixture[3],
                        1.0f / temperature,
                        1.44269504f / temperature,
                        0.7f,
                        0.4f,
                        0.0f,
                        0.0f,
                        static_cast<float>(V),
                        nullptr,
                        1};
        };
        if (delta == 0.03f) {
          const modxfer::KdSummand parts[] = {
              {Divergence::kJsd, 0.5f, mixture[0], mixture[1], mixture[2], mixture[3]},
              {Divergence::kTotalVariation, 2.0f, 0.0f, 0.0f, 0.0f, 0.0f}};
          for (int64_t id = 0; id <= modxfer::kNumDivergences; ++id) {
            KdSpec spec = spec_of(static_cast<Divergence>(id), 2.5f);
            spec.parts = parts, spec.num_parts = 2;
            if (spec.divergence ==
                Divergence::kAlphaBeta) {  // alpha, beta, sum, 1 / product of all
              spec.c0 = 0.2f, spec.c1 = 0.7f, spec.c2 = 0.9f, spec.c3 = 1.0f / 0.126f;
            }
            check_reach(modxfer::kd_row_kernels(spec.divergence), student, teacher, V, spec);
          }
        }
        for (Divergence divergence : kKnown) {
          const KdRowKernels& kernels = modxfer::kd_row_kernels(divergence);
          for (float temperature : {1.0f, 2.5f}) {
            const KdSpec spec = spec_of(divergence, temperature);
            for (int64_t label : {int64_t{-1}, int64_t{0}, V / 2}) {
              check_row(kernels, student, teacher, V, label, spec, beta);
              ++rows;
            }
          }
        }
      }
    }
    std::printf("%s: %d rows\n", modxfer::kd_row_kernels(kKnown[0]).isa, rows);
  }
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}

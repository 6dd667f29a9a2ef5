// One product of a warp on the emulator, as a library with C names: registers in, registers out.
#include "emulated.h"

namespace {

using namespace modxfer;

enum class Type : int { kBf16, kHalf, kTf32 };

MODXFER_KERNEL void multiply(Type type, const uint32_t* a, const uint32_t* b, float* c) {
  const int lane = device::thread_index();
  uint32_t left[4], right[2];
  float sums[4];
  for (int i = 0; i < 4; ++i) left[i] = a[4 * lane + i];
  for (int i = 0; i < 2; ++i) right[i] = b[2 * lane + i];
  for (int i = 0; i < 4; ++i) sums[i] = c[4 * lane + i];
  if (type == Type::kBf16) device::multiply_add<device::Bf16>(sums, left, right);
  if (type == Type::kHalf) device::multiply_add<device::Half>(sums, left, right);
  if (type == Type::kTf32) device::multiply_add_tf32(sums, left, right);
  for (int i = 0; i < 4; ++i) c[4 * lane + i] = sums[i];
}

MODXFER_KERNEL void round(float* x) {
  const int lane = device::thread_index();
  x[lane] = device::from_tf32(device::to_tf32(x[lane]));
}

}  // namespace

extern "C" {

const char* emulated_multiply_add(Type type, const uint32_t* a, const uint32_t* b, float* c) {
  return fault_of([&] { device::launch(multiply, {1, 32, 1, 0}, type, a, b, c); });
}

const char* emulated_to_tf32(float* x) {
  return fault_of([&] { device::launch(round, {1, 32, 1, 0}, x); });
}

}  // extern "C"

// The CUDA rows that find a teacher's K largest logits on the emulator, as a library with C names.
#include "emulated.h"

#include "teacher_topk_rows.cuh"

using namespace modxfer;
using namespace modxfer::cuda;

extern "C" {

void emulator_schedule(uint64_t seed) { set_schedule(seed); }

const char* emulated_teacher_topk(const TeacherTopKRows* rows, int blocks, int cluster, int threads,
                                  bool is_resident) {
  const int bytes =
      teacher_topk_shared_bytes(rows->classes, rows->count, cluster, rows->kind, is_resident);
  const device::Grid grid{blocks, threads, cluster, bytes};
  return fault_of([&] {
    device::launch(is_resident ? teacher_topk_rows<true> : teacher_topk_rows<false>, grid, *rows);
  });
}

// Of rows that are not held: the bytes of a block, and the longest list of at most `count`.
int teacher_topk_bytes(int classes, int count) {
  return teacher_topk_shared_bytes(classes, count, 1, Kind::kFloat, false);
}

int most_teacher_topk(int classes, int count, int most_shared) {
  return most_listed({count, kFoundListBytes}, teacher_topk_bytes(classes, count), most_shared);
}

}  // extern "C"

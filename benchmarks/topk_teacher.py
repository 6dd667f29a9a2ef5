"""linear_kd_loss against a teacher of K classes a row beside the dense one, in one run on a CPU.

    python -m benchmarks.topk_teacher

Each is timed in turn with the others, also in CPU time, which a busy machine changes less. FLOPs:
2 N V (3 D_s + D_t) of the dense teacher, 6 N V D_s of one whose classes are there already.
"""

import argparse
import statistics
import time

import torch

from modxfer_fast import TeacherTopK, linear_kd_loss

N, D_S, D_T, V, K = 1024, 512, 1024, 32000, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=7)
    runs = parser.parse_args().runs
    torch.manual_seed(0)
    hidden = torch.randn(N, D_S, requires_grad=True)
    weight = torch.nn.Parameter(torch.randn(V, D_S) / D_S**0.5)
    teacher_hidden, teacher_weight = torch.randn(N, D_T), torch.randn(V, D_T) / D_T**0.5
    found = (teacher_hidden @ teacher_weight.T).log_softmax(-1).topk(K)
    teachers = {"dense": (teacher_hidden, teacher_weight)}
    for tail in ("bucket", "renormalise", "none"):
        teachers[tail] = (TeacherTopK(found.indices, found.values, tail),)
    times: dict[str, list[float]] = {name: [] for name in teachers}
    cpu: dict[str, list[float]] = {name: [] for name in teachers}
    for run in range(runs + 1):  # the first warms up
        for name, teacher in teachers.items():
            hidden.grad = weight.grad = None
            start, cpu_start = time.perf_counter(), time.process_time()
            linear_kd_loss(hidden, weight, *teacher).backward()
            if run:
                times[name].append(1e3 * (time.perf_counter() - start))
                cpu[name].append(1e3 * (time.process_time() - cpu_start))
    print(f"N={N} D_s={D_S} D_t={D_T} V={V} K={K} fp32, {torch.get_num_threads()} threads")
    for name in teachers:
        columns = []
        for what, kind in (("ms", times), ("CPU ms", cpu)):
            median, dense = (statistics.median(kind[of]) for of in (name, "dense"))
            columns.append(f"{median:7.0f} {what}, {median / dense:.2f} of dense")
        print(f"{name:12}", *columns)


if __name__ == "__main__":
    main()

#!/usr/bin/env bash
# What is asked of a GPU, in three stages. Each leaves one archive, OUT/STAGE.tgz, renewed every few
# seconds and when the stage is cut: however it ends, results that came so far are not lost.
#
#   benchmarks/gpu_suite.sh first     150 s: kernels of every room on their first shapes, against
#                                     fp64, without waits, equal bits; a line for each room
#   benchmarks/gpu_suite.sh tables    280 s: times of every room beside floors, peers and gates
#   benchmarks/gpu_suite.sh full      540 s: all GPU tests
#
#   --dry-run        the same steps on a CPU: bodies of the tests and tables at their smallest sizes
#   OUT=DIR          of the archive (default: benchmarks/results/<gpu>)
#   LIMIT=SECONDS    of the whole stage, in place of those above
#   JOBS=N           test processes (default: two fewer than there are cores)
#   PYTHON=python3   interpreter with torch installed
#   MODXFER_COMMIT   the commit, where there is no .git to ask
set -uo pipefail
cd "$(dirname "$0")/.."

usage() {
    echo "usage: $0 first|tables|full [--dry-run]" >&2
    exit 2
}

stage=${1:-}
case "$stage" in
    first) limit=150 ;;
    tables) limit=280 ;;
    full) limit=540 ;;
    *) usage ;;
esac
case "${2:-}" in
    "") device=cuda ;;
    --dry-run) device=cpu ;;
    *) usage ;;
esac
python=${PYTHON:-python3}
reserve=15 # seconds in which a step that was cut tells what it has, and the archive is written
deadline=$((SECONDS + ${LIMIT:-$limit} - reserve))
cores=$(nproc)
jobs=${JOBS:-$((cores > 3 ? cores - 2 : cores))}
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false

if [[ $device == cuda ]]; then
    gpu=$("$python" -c 'import torch; print(torch.cuda.get_device_name())') || exit 1
else
    gpu=dry-run
fi
out=${OUT:-benchmarks/results/$(echo "$gpu" | tr 'A-Z ' 'a-z-')}
mkdir -p "$out"
work=$(mktemp -d)
running=
renewing=
status=0

archive() {
    local new=$out/.$stage.$BASHPID.tgz
    tar czf "$new" -C "$work" . # 1: a file grew meanwhile, and the part read is in the archive
    (($? <= 1)) && mv "$new" "$out/$stage.tgz"
}

# renew: an archive every few seconds, in the background until `settle`
renew() {
    while sleep 5; do archive; done > /dev/null 2>&1 &
    renewing=$!
}

settle() {
    [[ -n $renewing ]] && kill "$renewing" 2> /dev/null && wait "$renewing" 2> /dev/null
    renewing=
    rm -f "$out/.$stage."*.tgz
    archive
}

cut_short() {
    trap - INT TERM
    echo "== cut short after $SECONDS s" | tee -a "$work/steps.txt"
    if [[ -n $running ]]; then
        kill -INT "$running" 2>/dev/null
        for _ in {1..50}; do
            kill -0 "$running" 2>/dev/null || break
            sleep 0.1
        done
        kill -KILL "$running" 2>/dev/null
    fi
    settle
    exit 130
}
trap cut_short INT TERM
trap 'rm -rf "$work"' EXIT

# step NAME COMMAND...: output to the terminal and to NAME.log, until the deadline of the stage
step() {
    local name=$1 left=$((deadline - SECONDS)) started=$SECONDS code
    shift
    if ((left < 5)); then
        echo "== $name: not started, no time left" | tee -a "$work/steps.txt"
        status=1
        return 1
    fi
    echo "== $name (at most $left s)"
    # an interrupt, so that Python tells how far it came; in a group of its own, with all it started
    timeout --signal=INT --kill-after=10 "$left" "$@" > >(tee -a "$work/$name.log") 2>&1 &
    running=$!
    renew
    wait "$running"
    code=$?
    running=
    echo "== $name: exit $code after $((SECONDS - started)) s" | tee -a "$work/steps.txt"
    settle
    ((code == 0)) || status=1
    return "$code"
}

# tests MARKERS: GPU tests in parallel processes where pytest-xdist is there, and a line a room
tests() {
    local together=()
    "$python" -c 'import xdist' 2> /dev/null && together=(-n "$jobs" --dist worksteal)
    step tests "$python" -m pytest -q --tb=short -p no:cacheprovider -p tests.outcomes \
        --outcomes "$work/tests.jsonl" "${together[@]}" -m "$1" tests/*/test_*_gpu.py
    ((deadline += 10))
    step rooms "$python" -m tests.outcomes "$work/tests.jsonl"
}

tables() {
    local code=3 begun=-1 main="from modxfer_fast.jobs.bench import load_benchmarks as load; "
    main+="import sys; sys.exit(load()('gpu_tables').main(sys.argv[1:]))"
    # 3: a table took the device along; a new process goes on behind it, as long as one is begun
    while ((code == 3 && $(ls "$work" | grep -c 'csv$') > begun)); do
        begun=$(ls "$work" | grep -c 'csv$')
        step tables "$python" -P -c "$main" "$work" --device "$device"
        code=$?
    done
    ((deadline += 10))
    step gates "$python" -m benchmarks.gates "$work"/*.csv
    step plot "$python" -m benchmarks.plot "$work"/*.csv --output "$work/tables.png"
}

# Nothing is compiled but Triton's kernels, when they are first called: csrc comes along built, as
# modxfer_fast/_C.so, or doctor says that it is missing and its tests are skipped.
here="import pathlib, modxfer_fast, modxfer_fast.kernels as k; \
assert pathlib.Path(modxfer_fast.__file__).parents[1] == pathlib.Path('$PWD')"
if ! "$python" -P -c "$here" 2>/dev/null; then
    MODXFER_BUILD=none step install "$python" -m pip install --quiet --no-build-isolation --no-deps -e .
    if ! "$python" -P -c "$here"; then
        echo "== modxfer_fast cannot be imported from $PWD" | tee -a "$work/steps.txt"
        archive
        exit 1
    fi
fi
[[ $device == cuda ]] && step nvidia-smi nvidia-smi
step environment "$python" -P -m modxfer_fast doctor
# memory, races and barriers of csrc/cuda, at the smallest shapes, where the device lets a tool look
sanitizers() {
    command -v compute-sanitizer > /dev/null || return 0
    for tool in memcheck racecheck synccheck; do
        step "$tool" compute-sanitizer --tool "$tool" --error-exitcode 1 "$python" -m pytest -q \
            -p no:cacheprovider tests/kernels/test_*_cuda_gpu.py -k "unlike or (every and (fp32 or one-step))"
    done
}

case "$stage-$device" in
    first-cuda) tests "gpu and first"; sanitizers ;;
    full-cuda) tests gpu ;;
    first-cpu) tests first ;;
    full-cpu) tests "gpu or not gpu" ;;
    tables-*) tables ;;
esac
echo "results in $out/$stage.tgz"
exit $status

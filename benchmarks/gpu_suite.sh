#!/usr/bin/env bash
# Everything that needs a GPU, in at most 9 minutes: builds csrc, runs the GPU tests, then the
# benchmarks. Stages are bounded one by one, and each writes its results before the next begins.
#
#   benchmarks/gpu_suite.sh              OUT=DIR   results (default: benchmarks/results/<gpu>)
#   benchmarks/gpu_suite.sh --dry-run    PYTHON=python3   interpreter with torch installed
#
# --dry-run runs the same stages on a CPU at smoke size: GPU tests are collected and skipped.
set -uo pipefail
cd "$(dirname "$0")/.."

case "${1:-}" in
    "") device=cuda ;;
    --dry-run) device=cpu ;;
    *) echo "usage: $0 [--dry-run]" >&2; exit 2 ;;
esac
python=${PYTHON:-python3}
deadline=$((SECONDS + 500)) # and half a minute for the plots

if [[ $device == cuda ]]; then
    gpu=$("$python" -c 'import torch; print(torch.cuda.get_device_name())') || exit 1
else
    gpu=dry-run
fi
out=${OUT:-benchmarks/results/$(echo "$gpu" | tr 'A-Z ' 'a-z-')}
mkdir -p "$out"
status=0

# stage NAME SECONDS COMMAND...: output to the terminal and to $out/NAME.log; never past the deadline
stage() {
    local name=$1 limit=$2 left=$((deadline - SECONDS)) started=$SECONDS code
    shift 2
    if ((left < 10)); then
        echo "== $name: not started, ${left} s left" | tee -a "$out/stages.txt"
        status=1
        return
    fi
    ((limit > left)) && limit=$left
    echo "== $name (at most $limit s): $*"
    timeout --kill-after=10 "$limit" "$@" 2>&1 | tee "$out/$name.log"
    code=${PIPESTATUS[0]}
    echo "$name: exit $code after $((SECONDS - started)) s" | tee -a "$out/stages.txt"
    ((code == 0)) || status=1
}

# bench ROOM SHAPE SECONDS VARIANT...: one stage, one CSV and one JSON, written after each variant
bench() {
    local room=$1 shape=$2 limit=$3 name=$1-$2
    shift 3
    stage "$name" "$limit" "$python" -P -m modxfer_fast bench "$room" --device "$device" \
        --shape "$shape" --variant "$@" "${effort[@]}" \
        --csv "$out/$name.csv" --json "$out/$name.json"
}

# plot ROOM: every file of the room in one figure
plot() {
    local room=$1 files=("$out/$1"-*.json)
    [[ -e ${files[0]} ]] || return 0
    stage "plot-$room" 30 "$python" -m benchmarks.plot "${files[@]}" --output "$out/$room.png"
}

: > "$out/stages.txt"
stage environment 60 "$python" -P -m modxfer_fast doctor
if [[ $device == cuda ]]; then
    nvidia-smi > "$out/nvidia-smi.txt" 2>&1
    # of timing a variant: steps take milliseconds, and compiling the peers most of a stage
    effort=(--seconds 4)
    stage build 90 "$python" -m pip install --quiet --no-build-isolation --no-deps -e .
    stage tests 130 "$python" -m pytest -q -m gpu
    # each room once, then further shapes as time allows
    bench lora_linear llama3-8b 70 single qkv gate_up
    bench linear_kd_loss llama3-1b-from-8b 50 forward_kl jsd
    bench lora_block llama3-8b 60 all-linear
    bench projection_loss llama3-1b-from-8b 35 mse cosine
    bench lora_projection llama3-1b-from-8b 50 full rank16 none
    bench kd_loss llama3-1b-from-8b 35 forward_kl jsd
    bench correlation llama3-1b-from-8b 35 cross cross+grams
    bench linear_kd_loss llama3-8b-self 45 forward_kl
    bench lora_block qwen2.5-1.5b 50 all-linear
    bench lora_linear qwen2.5-1.5b 50 qkv gate_up
    bench linear_kd_loss qwen3-0.6b-from-8b 45 forward_kl
else
    effort=(--quick --seconds 0)
    stage tests 90 "$python" -m pytest -q -m gpu tests/kernels
    bench kd_loss smoke 60 forward_kl
    bench linear_kd_loss smoke 60 forward_kl
    bench projection_loss smoke 60 mse
    bench lora_linear smoke 60 single qkv
    bench lora_projection smoke 60 full rank16
    bench lora_block smoke 120 all-linear
    bench correlation smoke 60 cross cross+grams
fi
((deadline += 30))
for room in kd_loss linear_kd_loss lora_linear lora_block projection_loss lora_projection \
    correlation; do
    plot "$room"
done
echo "results in $out"
exit $status

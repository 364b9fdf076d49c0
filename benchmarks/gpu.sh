#!/usr/bin/env bash
# What a GPU makes of this package, in under ten minutes:
#
#     benchmarks/gpu.sh [--device cuda:0 | cpu] [--tiny] [--results FOLDER]
#
# compiled against eager networks at the published sizes in float32 and bfloat16, `studies verify-compile` on bars of
# the demonstration, a night of Toto on one GPU, by one worker and by two. Files go to benchmarks/results/DEVICE. Each
# step has its own time limit (MINUTES=30 makes all of them three times as long) and the next one runs whatever became
# of it; exit status 1 and the names of the steps that failed where one did. A benchmark of compilation that is ended
# early leaves what it has measured. --device cpu --tiny is a rehearsal without a GPU and without a compiler.
set -u
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-.venv/bin/python}
[ -x "$python" ] || python=python3
device=cuda:0 tiny="" results=""
while [ $# -gt 0 ]; do
    case $1 in
        --device) device=$2; shift 2 ;;
        --tiny) tiny=--tiny; shift ;;
        --results) results=$2; shift 2 ;;
        *) echo "gpu.sh: unknown option $1; see the comment at its beginning" >&2; exit 2 ;;
    esac
done
if [ "$device" = cpu ]; then
    name=cpu modes="default" one="--cpus 1" two="--cpus 2"
else
    name=$("$python" -c "import sys, torch; print(torch.cuda.get_device_name(sys.argv[1]).replace(' ', '-'))" "$device") ||
        { echo "gpu.sh: torch sees no $device; name another --device, or rehearse with --device cpu --tiny" >&2; exit 2; }
    number=${device#cuda:}
    modes="default reduce-overhead max-autotune" one="--gpus $number" two="--gpus $number,$number"
fi
if [ -n "$tiny" ]; then
    sizes="tiny --workers 0" models=toto horizons="1" night="--symbols 2 --trials 3"
    trials="--trials 1 --repeats 2 --modes default"
    export TOTO_COMPILE_BACKEND=eager KRONOS_COMPILE_BACKEND=eager
else
    sizes=published models="toto kronos" horizons="1 7 64" night="--symbols 24 --trials 100" trials="--trials 2"
fi
results=${results:-benchmarks/results/$name}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mkdir -p "$results"
failed=()

step() {  # step NAME SECONDS COMMAND...: SECONDS of the ten minutes
    local title=$1 limit=$(($2 * ${MINUTES:-10} / 10)) began=$SECONDS
    shift 2
    echo "== $title (at most $limit s): $*"
    # As Ctrl-C does, so that servers are stopped and folders removed; then for good.
    if timeout -s INT -k 15 "$limit" "$@"; then
        echo "== $title: done in $((SECONDS - began)) s"
    else
        failed+=("$title (exit status $?)")
        echo "== ${failed[-1]} after $((SECONDS - began)) s" >&2
    fi
}

verify() {
    "$(dirname "$python")/studies" verify-compile --config demo --data-dir "$scratch" --symbols SP500 \
        --models "${models// /,}" --device "$device" $trials --json > "$results/verify.json"
}
export -f verify
export python scratch device models trials results

# shellcheck disable=SC2086  # the lists are words
{
    step "bars of the demonstration" 20 "$(dirname "$python")/studies" demo-data --config demo --data-dir "$scratch"
    step "verify-compile" 90 bash -c verify
    step "night, one worker" 75 "$python" -m benchmarks.overnight $night $one $tiny --json "$results/overnight.json"
    step "night, two workers" 75 "$python" -m benchmarks.overnight $night $two $tiny --json "$results/overnight_two.json"
    for dtype in float32 bfloat16; do
        step "compiled networks, $dtype" 150 "$python" -m benchmarks.compile --device "$device" --sizes $sizes \
            --models $models --horizons $horizons --modes $modes --dtypes $dtype --once --repeats 3 --json "$results/compile_$dtype.json"
    done
}
if [ ${#failed[@]} -gt 0 ]; then
    printf 'failed: %s\n' "${failed[@]}" >&2
    exit 1
fi
echo "all steps done; figures are in $results"

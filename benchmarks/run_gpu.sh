#!/usr/bin/env bash
# All that wants a GPU, in at most nine minutes: tests marked gpu, the operators against eager, training steps, teachers, labelling
# from files to files, and loading where DALI is.
#
#   benchmarks/run_gpu.sh [FOLDER]        rows and logs go to FOLDER (benchmarks/results/gpu)
#
# Every part has a limit of its own, so a slow one costs itself alone; the exit code is that of the tests.
set -u
cd "$(dirname "$0")/.."
out=${1:-benchmarks/results/gpu}
python=${PYTHON:-python}
export PYTHONPATH=engine:kernels:benchmarks${PYTHONPATH:+:$PYTHONPATH}
mkdir -p "$out"
nvidia-smi --query-gpu=name,driver_version,clocks.sm,memory.total --format=csv | tee "$out/gpu.txt"

part() { # NAME SECONDS COMMAND...
    local name=$1 limit=$2 began=$SECONDS
    shift 2
    timeout --kill-after=5 "$limit" "$@" >"$out/$name.log" 2>&1
    local code=$?
    echo "$name: exit $code, $((SECONDS - began)) s"
    tail -n 25 "$out/$name.log"
    return $code
}

part tests 130 "$python" -m pytest -q -m gpu tests -p no:cacheprovider --timeout 60
tests=$?
part loss 50 "$python" benchmarks/bench_loss.py --device cuda --out "$out/loss.jsonl"
part ops 70 "$python" benchmarks/bench_ops.py --device cuda --no-compile --out "$out/ops.jsonl"
part step 80 "$python" benchmarks/bench_step.py --device cuda --out "$out/step.jsonl"
part step-r101-721 50 "$python" benchmarks/bench_step.py --device cuda --backbone resnet101 --crop 721 --batch 8 --no-compile \
    --no-files --rounds 3 --out "$out/step-r101-721.jsonl"
part teacher 70 "$python" benchmarks/bench_teacher.py --device cuda --out "$out/teacher.jsonl"
part label 60 "$python" benchmarks/bench_label.py --device cuda --tta stpp --out "$out/label.jsonl"
if "$python" -c "import nvidia.dali" 2>/dev/null; then
    part data 30 "$python" benchmarks/bench_data.py --device cuda --out "$out/data.jsonl"
fi
exit $tests

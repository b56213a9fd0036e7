#!/usr/bin/env bash
# All tests and benchmarks that need a GPU, in two calls of about six minutes, without network and installation.
#
#   benchmarks/run_gpu.sh first|second|single [FOLDER]
#       [--device cpu] [--small] [--limit SECONDS] [--unpassed FILE]
#
# first: correctness, and where the time goes. second: the tests that did not pass in the first (--unpassed, its
# unpassed.txt; otherwise all), and benchmarks that compile. single: the first without its last part and with the
# compiled peer, if there is no second. FOLDER ($OUT, or benchmarks/results/gpu) gets rows.jsonl, log.txt and
# unpassed.txt, written as parts run, so that an interrupted call keeps its results. --device cpu --small runs
# every part at its smallest. See docs/gpu.md. The exit code is that of the tests; 2: nothing could run.
set -u
here=$(cd "$(dirname "$0")/.." && pwd)
usage="usage: benchmarks/run_gpu.sh first|second|single [FOLDER] [--device cpu] [--small] [--limit SECONDS] [--unpassed FILE]"
call=${1:-} out=${OUT:-benchmarks/results/gpu} device=cuda small=() limit= unpassed=
[[ $call =~ ^(first|second|single)$ ]] || { echo "$usage" >&2; exit 2; }
shift
while (($#)); do
    case $1 in
        --device) device=${2:-} && shift 2 ;;
        --small) small=(--small) && shift ;;
        --limit) limit=${2:-} && shift 2 ;;
        --unpassed) unpassed=${2:-} && shift 2 ;;
        -*) echo "$usage" >&2; exit 2 ;;
        *) out=$1 && shift ;;
    esac || { echo "$usage" >&2; exit 2; }
done
[[ -z $unpassed || -f $unpassed ]] || { echo "run_gpu: --unpassed $unpassed does not exist" >&2; exit 2; }
mkdir -p "$out" && out=$(cd "$out" && pwd) && unpassed=${unpassed:+$(realpath "$unpassed")} || exit 2
cd "$here" || exit 2
rows=$out/rows.jsonl log=$out/log.txt python=${PYTHON:-python3}
if [ "$device" = cpu ]; then slack=10; else slack=1; fi  # limits are for a GPU; a CPU may be shared
deadline=$((SECONDS + ${limit:-$([ "$call" = second ] && echo 370 || echo 340) * slack}))
reserve=6  # seconds for the summary
for wheel in build/gpu-wheels/*.whl; do  # pure Python, importable without installation
    [ -e "$wheel" ] && carried=${carried:-}:$here/$wheel
done
export PYTHONPATH=$here/engine:$here/kernels:$here/benchmarks${carried:-}${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export STPP_GIT=${STPP_GIT:-$(git rev-parse HEAD 2>/dev/null)}

needed="import numpy, PIL, pyarrow, tqdm, tyro, braceexpand, jinja2, tensorboard, pytest, xdist, pytest_timeout, hypothesis, torch, stpp.cli
import unpassed, machine, bench_data, bench_fused_conv, bench_label, bench_loss, bench_ops, bench_profile, bench_shapes
import bench_step, bench_teacher, bench_unimatch, check_memory, check_resume, check_run
assert '$device' != 'cuda' or torch.cuda.is_available(), 'PyTorch sees no CUDA device'"
if ! said=$("$python" -c "$needed" 2>&1); then
    echo "run_gpu: nothing can run here: $(tail -n 1 <<<"$said") (pure Python modules can be carried: make gpu-wheels)" |
        tee -a "$log" >&2
    exit 2
fi

lines=() running= tests=0
note() { # TEXT: adds a line to the log, the output and the summary
    lines+=("$1")
    echo "$1" | tee -a "$log"
}

summary() {
    { printf '\n%s call on %s, commit %s:\n' "$call" "$device" "${STPP_GIT:-unknown (set STPP_GIT)}"
      printf '  %s\n' "${lines[@]:-nothing ran}"
      "$python" benchmarks/summary.py "$rows"; } 2>&1 | tee -a "$log"
}

cut_off() {
    trap '' TERM INT HUP
    [ -n "$running" ] && kill -TERM "$running" 2>/dev/null && wait "$running"
    note "cut off by a signal"
    summary
    exit 143
}
trap cut_off TERM INT HUP

part() { # NAME SECONDS COMMAND...: runs at most that long, within the call's own limit
    local name=$1 most=$(($2 * slack)) began=$SECONDS left=$((deadline - SECONDS - reserve)) code
    shift 2
    ((most > left)) && most=$left
    if ((most < 5)); then
        note "$name: skipped, no time left"
        return 124
    fi
    printf '\n== %s, at most %s s: %s\n' "$name" "$most" "$*" >>"$log"
    STPP_PART=$name timeout --kill-after=5 "$most" "$@" >>"$log" 2>&1 &
    running=$!
    wait "$running"
    code=$?
    running=
    if ((code)); then tail -n 12 "$log"; fi
    note "$name: exit $code, $((SECONDS - began)) s$( ((code == 124 || code == 137)) && echo ", cut off at its limit")"
    return $code
}

bench() { # NAME SECONDS SCRIPT OPTIONS...
    part "$1" "$2" "$python" "benchmarks/$3.py" "${@:4}" --device "$device" "${small[@]}" --out "$rows" --append
}

files=(kernels/test_argmax kernels/test_batch_norm_clamp kernels/test_softmax_accumulate kernels/test_confusion kernels/test_cross_entropy kernels/test_depthwise_conv kernels/test_dilated_conv kernels/test_label_probability models/test_models label/test_labels inference/test_fused loading/test_loaders images/test_zoo test_device)
[ ${#small[@]} = 0 ] || files=(kernels/test_argmax)
marked=$([ "$device" = cuda ] && echo gpu || echo "not gpu and not slow")
cores=$(nproc)
pytest() { # NAME SECONDS OPTIONS...
    OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} part "$1" "$2" "$python" -m pytest -m "$marked" -q -rfE --durations=10 --rootdir="$here" \
        -n $((cores < 8 ? cores : 8)) --dist worksteal --timeout=240 -p no:cacheprovider -p unpassed "${@:3}"
}
listed=("${files[@]/#/tests/}")
listed=("${listed[@]/%/.py}")

first() { # all but the last part
    part machine 25 "$python" benchmarks/machine.py
    pytest tests 110 --unpassed="$out/unpassed.txt" "${listed[@]}"
    tests=$?
    bench step 60 bench_step --no-compile --no-files --rounds 5
    bench profile 40 bench_profile
    bench profile-no-search 40 bench_profile --no-cudnn-benchmark
    bench shapes 30 bench_shapes
    bench fused-conv 20 bench_fused_conv
    bench teacher-eager 30 bench_teacher --no-compile --sizes 360x480 --batches 8
    bench loss 45 bench_loss --no-compile --graphs --launches
    bench label 50 bench_label --tta stpp --images 64 --size 360x480 --public-images 8
    bench label-mixed 60 bench_label --tta stpp --images 32 --warm-up none --public-images 0
}

step_compiled() {
    bench step 170 bench_step --rounds 5
}

second() {
    if [ -z "$unpassed" ]; then
        pytest tests 110 --unpassed="$out/unpassed.txt" "${listed[@]}"
        tests=$?
    elif [ -s "$unpassed" ]; then
        # A copy, because the file to write may be the one to read.
        cp "$unpassed" "$out/.only" && pytest tests 60 --only="$out/.only" --unpassed="$out/unpassed.txt" "${listed[@]}"
        tests=$?
        rm -f "$out/.only"
    else
        note "tests: all passed before"
    fi
    if [ -n "${NEW_TESTS:-}" ]; then  # files of newer tests, set by the caller
        # shellcheck disable=SC2086  # words
        pytest new-tests 60 $NEW_TESTS || tests=$?
    fi
    step_compiled
    bench step-r101-721 50 bench_step --backbone resnet101 --crop 721 --batch 8 --no-compile --no-files --rounds 3
    bench ops-conv 30 bench_ops --only dilated_conv --maps 41x41 90x120 --no-compile --rounds 5
    bench unimatch 60 bench_unimatch --no-compile --no-files --rounds 3
    bench teacher 100 bench_teacher --backends inductor --frozen --sizes 360x480 --batches 8 16
    bench label 60 bench_label --tta stpp --images 64 --size 360x480 --public-images 8
    bench label-mixed 40 bench_label --tta stpp --images 32 --warm-up none --public-images 0
    bench ops-labelling 45 bench_ops --only argmax augmentation masks --no-compile --graphs
    bench resume 60 check_resume
    if "$python" -c "import nvidia.dali" 2>/dev/null; then bench data 30 bench_data; fi
    bench memory 60 check_memory
    marked=gpu pytest engine-test 90 tests/inference/test_engines_gpu.py -k "inductor and deeplabv3plus and bf16" || tests=$?
}

printf '\n%s call, %s\n' "$call" "$(date -u +%FT%TZ)" >>"$log"
{ # read completely first, because the file may change while it runs
    case $call in
        first) first; bench run 60 check_run ;;
        single) first; step_compiled ;;
        second) second ;;
    esac
    summary
    exit "$tests"
}

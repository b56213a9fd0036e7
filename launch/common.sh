# shellcheck shell=bash
# Functions of the launch scripts; sourced, not run.

# First argument --dry-run: print the command instead of running it.
dry_run=""
if [ "${1-}" = "--dry-run" ]; then
    dry_run=1
    shift
fi
# Prefer the project's own environment next to these scripts.
PYTHON=${PYTHON:-python3}
if [ -x "$(dirname "${BASH_SOURCE[0]}")/../.venv/bin/python" ] && [ "$PYTHON" = python3 ]; then
    PYTHON=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv/bin/python
fi

# Prints the number of processes for this machine: NPROC, or one for each visible GPU, or one.
processes() {
    local gpus=0 visible
    if command -v nvidia-smi >/dev/null; then
        gpus=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU ' || true)
    fi
    if [ "$gpus" -gt 0 ] && [ -n "${CUDA_VISIBLE_DEVICES-}" ]; then
        IFS=, read -ra visible <<<"$CUDA_VISIBLE_DEVICES"
        gpus=${#visible[@]}
    fi
    echo "${NPROC:-$((gpus > 0 ? gpus : 1))}"
}

# Replaces this script with a command, or prints the command.
start() {
    if [ -n "$dry_run" ]; then
        printf '%q ' "$@"
        echo
    else
        exec "$@"
    fi
}

# Prints the comment at the top of the script, and exits with 2.
usage() {
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" >&2
    exit 2
}

# shellcheck shell=bash
# What the launch scripts share; sourced, not run.

# First argument --dry-run: print the command instead of running it.
dry_run=""
if [ "${1-}" = "--dry-run" ]; then
    dry_run=1
    shift
fi
# The command of the project's own environment where there is one beside these scripts.
PYTHON=${PYTHON:-python3}
if [ -x "$(dirname "${BASH_SOURCE[0]}")/../.venv/bin/python" ] && [ "$PYTHON" = python3 ]; then
    PYTHON=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv/bin/python
fi

# The number of processes to start on this machine: NPROC, or one for each GPU, or one.
processes() {
    local gpus=0
    if command -v nvidia-smi >/dev/null; then
        gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l)
    fi
    echo "${NPROC:-$((gpus > 0 ? gpus : 1))}"
}

# Runs a command in the place of this script, or prints it.
start() {
    if [ -n "$dry_run" ]; then
        printf '%q ' "$@"
        echo
    else
        exec "$@"
    fi
}

# Prints the comment at the top of the script and ends it as a user's mistake.
usage() {
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" >&2
    exit 2
}

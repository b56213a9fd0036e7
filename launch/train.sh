#!/usr/bin/env bash
# Trains on one machine, with a process for each GPU (NPROC sets another number). To resume, run the same
# command again.
#
#   launch/train.sh [--dry-run] --recipe launch/recipes/camvid_stpp.toml --data.root DATA --out RUN \
#       [flags of stpp train]
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "$(readlink -f "$0")")/common.sh"
[ $# -gt 0 ] || usage
start "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$(processes)" -m stpp train "$@"

#!/usr/bin/env bash
# Labels a corpus on one machine, with a process for each GPU (NPROC sets another number). To resume, run the
# same command again.
#
#   launch/label.sh [--dry-run] --teacher best.pt --source photos --out labels [flags of stpp label]
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "$(readlink -f "$0")")/common.sh"
[ $# -gt 0 ] || usage
start "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$(processes)" -m stpp label "$@"

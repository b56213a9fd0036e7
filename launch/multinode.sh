#!/usr/bin/env bash
# Trains or labels on several machines: run the same command on each of them, all seeing the same --out.
#
#   HOST=host0 NNODES=2 launch/multinode.sh [--dry-run] train --recipe RECIPE --data.root DATA --out RUN
#   HOST=host0 NNODES=1:8 launch/multinode.sh [--dry-run] label --teacher best.pt --source photos --out labels
#
# HOST          the machine that the others meet at; it must be one of them
# PORT          a free port there (29500)
# NNODES        machines: a number, or MIN:MAX, where some may go and come back. Labelling takes any number; training needs a
#               global batch that divides into every number of processes between
# NPROC         processes of this machine (one for each GPU)
# MAX_RESTARTS  how often the processes are started again after one of them died (3)
# JOB           name of the job, the same on all machines and another for every job on HOST and PORT (stpp)
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"
case "${1-}" in train | label) ;; *) usage ;; esac
: "${HOST:?name the machine that the others meet at}" "${NNODES:?say how many machines, or MIN:MAX}"
# Processes that are started again must not find the addresses of those before them in torchrun's own store (docs/scaling.md).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
start "$PYTHON" -m torch.distributed.run --nnodes "$NNODES" --nproc-per-node "$(processes)" --rdzv-backend c10d \
    --rdzv-endpoint "$HOST:${PORT:-29500}" --rdzv-id "${JOB:-stpp}" --max-restarts "${MAX_RESTARTS:-3}" -m stpp "$@"

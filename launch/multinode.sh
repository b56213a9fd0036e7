#!/usr/bin/env bash
# Trains or labels on several machines: run the same command on each of them, all seeing the same --out.
#
#   HOST=host0 NNODES=2 launch/multinode.sh [--dry-run] train --recipe RECIPE --data.root DATA --out RUN
#   HOST=host0 NNODES=1:8 launch/multinode.sh [--dry-run] label --teacher best.pt --source photos --out labels
#
# HOST          machine of the rendezvous, one of those of the job
# PORT          free port of HOST (29500)
# NNODES        number of machines, or MIN:MAX if some may leave and return. Labelling takes any number; for
#               training, every possible number of processes must divide the global batch
# NPROC         processes of this machine (one for each GPU)
# MAX_RESTARTS  restarts of the processes after one of them died (3)
# JOB           name of the job, the same on all machines and unique for HOST and PORT (stpp)
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "$(readlink -f "$0")")/common.sh"
case "${1-}" in train | label) ;; *) usage ;; esac
: "${HOST:?set the machine of the rendezvous}" "${NNODES:?set the number of machines, or MIN:MAX}"
# Restarted processes must not find the addresses of the previous ones in torchrun's store (docs/scaling.md).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
start "$PYTHON" -m torch.distributed.run --nnodes "$NNODES" --nproc-per-node "$(processes)" \
    --rdzv-backend c10d --rdzv-endpoint "$HOST:${PORT:-29500}" --rdzv-id "${JOB:-stpp}" \
    --max-restarts "${MAX_RESTARTS:-3}" -m stpp "$@"

#!/usr/bin/env bash
# One rank: gives torch the names that it knows, runs the command, and notes how the first rank that fails ended. The
# others' failures follow from it, and srun ends them without asking, so that only the first status says what happened.
#   ATTEMPT_DIR=... srun examples/slurm/rank.sh COMMAND...
# Under torchrun, which sets RANK itself, it only notes. Signals go to the command, which SLURM signals as well.
set -euo pipefail

if [ -z "${RANK:-}" ]; then
    export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
    # `8(x4)` or `8(x3),4`: the tasks of the first nodes.
    export LOCAL_WORLD_SIZE=${SLURM_STEP_TASKS_PER_NODE%%[(,]*}
fi

# Not ignored, or the command would ignore them as well until it has its own handlers.
trap : USR1 TERM INT
status=0
"$@" || status=$?
if [ "$status" -ne 0 ]; then
    # Fails where the file is there: the first rank wins.
    (set -o noclobber; echo "$status rank $RANK on ${SLURMD_NODENAME:-$(hostname)}" >"$ATTEMPT_DIR/first-exit") 2>/dev/null || true
fi
exit "$status"

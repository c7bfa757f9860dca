#!/usr/bin/env bash
# Kills a tiny run at seeded moments, a hundred times, in several layouts: every end must have the same bits.
#   bash tools/soak.sh [--kills N] [--seed N] [--json PATH]      five minutes on two cores; --help lists all options
set -euo pipefail
cd "$(dirname "$0")/.."
. tools/venv.sh
install_project test
export OMP_NUM_THREADS=1 PYTHONPATH="$PWD"
exec python -W ignore tools/soak.py "$@"

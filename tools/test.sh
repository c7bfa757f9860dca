#!/usr/bin/env bash
# Every test that this machine can run. Makes or reuses .venv.
#   bash tools/test.sh [--all] [pytest arguments]     --all adds the long tests marked `slow`
set -euo pipefail
cd "$(dirname "$0")/.."
. tools/venv.sh
install_project test
slow=(-m "not slow")
if [ "${1:-}" = --all ]; then slow=(); shift; fi
ruff check .
ruff format --check .
# One thread a process: most tests start several.
OMP_NUM_THREADS=1 python -m pytest -q "${slow[@]}" "$@"

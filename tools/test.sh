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
export OMP_NUM_THREADS=1 # most tests start several processes
if [ $# -gt 0 ]; then exec python -m pytest -q "${slow[@]}" "$@"; fi
# A unit test is one process, so two run at a time. The quick start, most of whose time is the start of programs, runs
# beside them and so begins first; the other tests fill two cores by themselves.
status=0
python -m pytest -q "${slow[@]}" -n 2 --dist loadfile --no-loadscope-reorder tests/test_quickstart.py tests/unit || status=$?
python -m pytest -q "${slow[@]}" tests --ignore tests/unit --ignore tests/test_quickstart.py || status=$?
exit $status

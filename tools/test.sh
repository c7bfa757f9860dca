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
# A unit test is one process, so two run at a time. What starts programs and waits for them (SLURM's jobs, the quick start,
# the documentation's pages, a scaling study, runs that are killed) runs beside them and begins first. Of the others, those
# of reliability wait often enough to leave room for a third worker beside those that compute on two processes.
waiting=(tests/reliability/test_slurm.py tests/test_quickstart.py tests/unit/test_pages.py tests/distributed/test_study.py
    tests/reliability/test_kill.py tests/reliability/test_stop.py)
status=0
python -m pytest -q "${slow[@]}" -n 3 --dist loadfile --no-loadscope-reorder "${waiting[@]}" tests/unit/test_*.py || status=$?
python -m pytest -q "${slow[@]}" -n 3 --dist loadfile tests --ignore tests/unit "${waiting[@]/#/--ignore=}" || status=$?
exit $status

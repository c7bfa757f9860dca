#!/usr/bin/env bash
# From nothing to a trained, exported and evaluated embedding model. Options go to examples/quickstart/quickstart.py;
# those that begin with --parallel. go on to both training runs.
#   bash examples/quickstart/run.sh [--parallel.tp 2] [--help]
set -euo pipefail
cd "$(dirname "$0")/../.."
. tools/venv.sh
install_project eval
exec python examples/quickstart/quickstart.py "$@"

#!/usr/bin/env bash
# What a bare Debian or Ubuntu machine needs before tools/test.sh: the venv module, where Python comes without it.
set -euo pipefail
if python3 -c 'import ensurepip' 2>/dev/null && command -v git >/dev/null; then
    exit 0
fi
apt-get update -q
apt-get install -y -q python3-venv git

# Sourced by examples/quickstart/run.sh and tools/test.sh: makes or reuses .venv and installs the project into it.
#   install_project "extra1,extra2"

fail() { echo "error: $*" >&2; exit 1; }

find_python() {
    for candidate in "${PYTHON:-}" python3 python3.12 python3.11 python3.10; do
        [ -n "$candidate" ] && command -v "$candidate" >/dev/null || continue
        if "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    fail "this needs Python 3.10, 3.11 or 3.12, and none is on the PATH (set PYTHON to name one)"
}

install_project() {
    [ "$(uname -s)/$(uname -m)" = Linux/x86_64 ] || fail "this runs on Linux x86-64 (or WSL2), not on $(uname -s) $(uname -m)"
    if [ ! -x .venv/bin/python ]; then
        python=$(find_python) || exit 1
        "$python" -m venv .venv || fail "$python cannot make a virtual environment (on Debian: apt install python3-venv)"
    fi
    local stamp=".venv/installed-$(cat setup.py pyproject.toml tools/venv.sh <(echo "$1") | sha256sum | cut -c1-16)"
    if [ ! -f "$stamp" ]; then
        echo "Installing into .venv: about 0.6 GB to download with the CPU build of torch (3 GB with a CUDA build), 2 to 4 GB on disk."
        if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then
            .venv/bin/python -m pip install -q torch || fail "pip could not install torch"
        else
            # By name and version alone: pip's own configuration decides where from. This release has a CPU build.
            .venv/bin/python -m pip install -q torch==2.13.0 || fail "pip could not install torch 2.13.0"
        fi
        .venv/bin/python -m pip install -q -e ".[$1]" || fail "pip could not install the project"
        touch "$stamp"
    fi
    PATH="$PWD/.venv/bin:$PATH"
    export PATH HF_HUB_OFFLINE=1
}

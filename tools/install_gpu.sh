#!/usr/bin/env bash
# TransformerEngine, and Apex if asked for, beside a torch that is there already (docs/install-gpu.md has the versions).
#   bash tools/install_gpu.sh [OPTIONS]
#     --dry-run        print the commands, run none of them; what is missing is told and does not end it
#     --python PATH    interpreter of the environment (default: python3)
#     --wheels DIR     take all packages from this folder and ask no index: for a machine without a network
#     --keep DIR       folder for the wheels that are built here (default: wheels); each fits this torch only
#     --arch LIST      compute capabilities to build for, such as '90' or '90;100' (default: those of the GPUs here)
#     --apex [SOURCE]  build Apex too, from a checkout or this address (default: https://github.com/NVIDIA/apex)
# MAX_JOBS is the number of compilers at a time (default: the number of cores).
# It ends with `nvembed doctor` and one linear in FP8, so with 0 only where that works, or with a line that the GPU has no
# FP8.
set -euo pipefail

TE_VERSION=2.20.2
HEADERS="cuda_runtime.h crt/host_config.h cublas_v2.h cudnn.h nccl.h"
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=python3 dry_run=0 wheels="" keep=wheels arch="" apex=""

cannot() {
    echo "install_gpu: cannot: $*" >&2
    [ "$dry_run" = 1 ] || exit 1
}

run() {
    printf '+'
    printf ' %q' "$@"
    echo
    if [ "$dry_run" = 0 ]; then "$@"; fi
}

usage() { sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; }

read_options() {
    while [ $# -gt 0 ]; do
        case "$1" in
            --dry-run) dry_run=1 ;;
            --python | --wheels | --keep | --arch)
                [ $# -gt 1 ] || { echo "install_gpu: $1 needs a value" >&2; exit 2; }
                printf -v "${1#--}" '%s' "$2"
                shift
                ;;
            --apex)
                apex=https://github.com/NVIDIA/apex
                if [ $# -gt 1 ] && [ "${2#--}" = "$2" ]; then apex=$2; shift; fi
                ;;
            --help) usage; exit 0 ;;
            *) usage >&2; exit 2 ;;
        esac
        shift
    done
}

# What one line of Python prints; nothing where it fails.
ask() { "$python" -c "$1" 2>/dev/null || true; }

check_python_and_torch() {
    command -v "$python" >/dev/null || cannot "there is no $python"
    local version
    version=$(ask 'import sys; print("%d.%d" % sys.version_info[:2])')
    case "$version" in
        3.10 | 3.11 | 3.12) ;;
        *) cannot "Python is ${version:-missing}, and nvembed_mcore needs 3.10 to 3.12" ;;
    esac
    torch=$(ask 'import torch; print(torch.__version__)')
    [ -n "$torch" ] || cannot "torch is not installed for $python: install it first, built for CUDA 13 or 12"
    cuda=$(ask 'import torch; print((torch.version.cuda or "").split(".")[0])')
    case "$cuda" in
        12 | 13) ;;
        *)
            [ -z "$torch" ] || cannot "torch $torch is built for ${cuda:+CUDA }${cuda:-CPUs}, and TransformerEngine $TE_VERSION needs CUDA 12 or 13"
            cuda=13
            ;;
    esac
}

check_gpu() {
    if [ -z "$arch" ] && command -v nvidia-smi >/dev/null; then
        arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | tr -d '. ' | sort -un | paste -sd';')
    fi
    if [ -z "$arch" ]; then
        cannot "there is no GPU to build for (nvidia-smi finds none): name its compute capability, --arch 90 for Hopper"
        arch=90
    fi
}

# Whether all headers are below one of these folders.
all_in() {
    local header folder found
    for header in $HEADERS; do
        found=0
        for folder in "$@"; do
            if [ -e "$folder/$header" ]; then found=1; fi
        done
        [ "$found" = 1 ] || { missing=$header; return 1; }
    done
}

# The CUDA toolkit has them, with cuDNN and NCCL inside or in the system's folders; or torch's own packages do.
check_headers() {
    use_wheels=0 missing=""
    local toolkit=${CUDA_HOME:-/usr/local/cuda} packages
    if all_in "$toolkit/include" /usr/include "/usr/include/$(uname -m)-linux-gnu"; then return; fi
    packages=$(ask 'import nvidia; print(next(iter(nvidia.__path__)))')
    if [ -n "$packages" ] && all_in "$packages"/*/include; then
        use_wheels=1
        return
    fi
    cannot "no $missing, in $toolkit and the system's folders or in torch's packages. Install CUDA's toolkit with cuDNN" \
        "and NCCL and set CUDA_HOME, or the package of nvcc (nvidia-cuda-nvcc, for CUDA 12 nvidia-cuda-nvcc-cu12)"
}

check_compilers() {
    command -v "${CXX:-c++}" >/dev/null || cannot "there is no C++ compiler (${CXX:-c++})"
    [ -z "$apex" ] && return
    command -v "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" >/dev/null || command -v nvcc >/dev/null ||
        cannot "there is no nvcc, which Apex is compiled with: set CUDA_HOME to the toolkit that torch is built for"
}

pip() { run "$python" -m pip "$1" "${index[@]}" "${@:2}"; }

install_transformer_engine() {
    # What its build needs, and what it imports.
    pip install setuptools wheel ninja packaging pybind11 einops onnxscript pydantic
    # It refuses to be imported unless all three parts are there, of one version.
    pip install --no-deps "transformer-engine==$TE_VERSION" "transformer-engine-cu$cuda==$TE_VERSION"
    # Not the exchange between experts, whose headers come with the newest NCCL only; and no wheel of another torch.
    local settings=("NVTE_FRAMEWORK=pytorch" "NVTE_CUDA_ARCHS=$arch" "NVTE_WITH_NCCL_EP=0" "MAX_JOBS=$jobs"
        "NVTE_PYTORCH_FORCE_BUILD=TRUE" "NVTE_BUILD_USE_NVIDIA_WHEELS=$use_wheels")
    run env "${settings[@]}" "$python" -m pip wheel "${index[@]}" --no-build-isolation --no-deps \
        --no-binary transformer-engine-torch --wheel-dir "$keep" "transformer-engine-torch==$TE_VERSION"
    run "$python" -m pip install --no-index --no-deps --find-links "$keep" "transformer-engine-torch==$TE_VERSION"
}

# Never `pip install apex`: the package of that name on the index is another one.
install_apex() {
    local source=$apex capabilities
    if [ ! -d "$source" ]; then
        source=$keep/apex-source
        [ -d "$source" ] || run git clone --depth 1 "$apex" "$source"
    fi
    # 90 is 9.0, 100 is 10.0.
    capabilities=$(sed -E 's/([0-9])(;|$)/.\1\2/g' <<<"$arch")
    run env APEX_CPP_EXT=1 APEX_CUDA_EXT=1 "TORCH_CUDA_ARCH_LIST=$capabilities" "MAX_JOBS=$jobs" \
        "$python" -m pip wheel --no-build-isolation --no-deps --wheel-dir "$keep/apex" "$source"
    run "$python" -m pip install --no-index --no-deps --force-reinstall --find-links "$keep/apex" apex
}

ONE_LINEAR='
import torch, transformer_engine.pytorch as te
from transformer_engine.common.recipe import Float8CurrentScaling
able, why_not = te.is_fp8_available(return_reason=True)
if not able:
    raise SystemExit(print(f"no FP8 on this GPU: {why_not}"))
linear = te.Linear(256, 256, bias=False, params_dtype=torch.bfloat16, device="cuda")
states = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
with te.autocast(enabled=True, recipe=Float8CurrentScaling()):
    out = linear(states)
out.float().square().sum().backward()
difference = ((out - states @ linear.weight.T).norm() / out.norm()).item()
print(f"one linear in FP8: {difference:.3f} from bfloat16, relative")
assert difference < 0.1 and linear.weight.grad.isfinite().all() and states.grad.isfinite().all()
'

verify() {
    local now
    now=$(ask 'import torch; print(torch.__version__)')
    [ "$now" = "$torch" ] || cannot "torch was $torch and is $now now: something replaced it, build again"
    run "$python" -m nvembed_mcore doctor
    run "$python" -c "$ONE_LINEAR"
}

read_options "$@"
check_python_and_torch
check_gpu
check_headers
check_compilers
jobs=${MAX_JOBS:-$(nproc)} index=()
if [ -n "$wheels" ]; then
    [ -d "$wheels" ] || cannot "there is no folder $wheels"
    index=(--no-index --find-links "$wheels")
fi
pip install --editable "${here}[gpu]"
install_transformer_engine
if [ -n "$apex" ]; then install_apex; fi
verify

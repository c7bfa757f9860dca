# shellcheck shell=bash
# What differs from site to site. The only file here to edit. Every job script sources it, on the first node only; the
# exports reach all ranks. A variable that is set when a job is submitted wins over the value here, where it is written
# `${NAME:=value}`. No tokens or passwords in here: a job's environment can be read by others (`scontrol show job`,
# /proc). Put them in files of mode 600 that the programs read themselves (~/.netrc for W&B, $HF_HOME/token).

# Software: modules, then the virtual environment that `pip install` put nvembed into.
# module load cuda/13.0
: "${NVEMBED_VENV:=$PWD/.venv}"
export PATH="$NVEMBED_VENV/bin:$PATH"

# Account, partition and the like, for chain.sh; with `sbatch` by hand give them as options (-A, -p).
# export SBATCH_ACCOUNT=my-account SBATCH_PARTITION=gpu

# How often one job may fail and start again; a preemption is no failure and does not count.
: "${MAX_FAILURES:=10}"
# 0 leaves out the pre-flight check.
: "${PREFLIGHT:=1}"

# The network between nodes. NCCL and gloo choose an interface themselves, often the wrong one where there are several.
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
# A collective that fails ends its process instead of waiting for ever.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1
# Megatron's tensor parallelism overlaps communication by the order in which kernels are queued: 1, where parallel.tp is
# above 1. Without it, what travels beside the computation (parallel.overlap_grad_reduce, overlap_param_gather) should
# have queues of its own: 32, in NVIDIA's recipes.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
# TransformerEngine's norms take all multiprocessors of a GPU at once, and NCCL's kernels then wait until they end. This
# many are left to NCCL: 16 to 20 in NVIDIA's recipes. Only worth it where something overlaps, on more than one GPU.
# export NVTE_FWD_LAYERNORM_SM_MARGIN=16 NVTE_BWD_LAYERNORM_SM_MARGIN=16
# Norms by cuDNN, as in NVIDIA's recipes for Hopper.
# export NVTE_NORM_FWD_USE_CUDNN=1 NVTE_NORM_BWD_USE_CUDNN=1
# On top of seeds: what cuBLAS and NCCL need to give the same bits again in the same layout. Costs speed.
# export CUBLAS_WORKSPACE_CONFIG=:4096:8 NCCL_ALGO=Ring NVTE_ALLOW_NONDETERMINISTIC_ALGO=0

# Threads of one rank: its share of the node's cores at most.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"

# Caches: Hugging Face's on the shared file system, compiled kernels on each node's own disk.
# export HF_HOME=/shared/cache/huggingface
# export TRITON_CACHE_DIR=/scratch/$USER/triton
# Compute nodes have no way out: without this each file is looked for on the network first.
export HF_HUB_OFFLINE=1

# W&B sends source code and a patch of what is not committed unless told otherwise.
export WANDB_DISABLE_CODE=true WANDB_CONSOLE=off

# Logs in order, and a stack of each thread where a process dies of a signal such as SIGSEGV.
export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1
# New files are for the user and the group only.
umask 027

#!/usr/bin/env bash
# The two stages of NV-Embed as five jobs, each of which waits for the one before: stage 1, mining, stage 2, export,
# evaluation. From the root of a checkout of the repository:
#   bash examples/slurm/chain.sh STAGE1.yaml STAGE2.yaml RECORDS OUTPUT TESTSET [SBATCH OPTIONS ...]
#     STAGE1.yaml  configuration of stage 1; its run_dir is OUTPUT/stage1
#     STAGE2.yaml  of stage 2: its run_dir is OUTPUT/stage2, model.init_from OUTPUT/stage1, and a data set of it
#                  OUTPUT/mined/records.jsonl
#     RECORDS      training records that get hard negatives, mined by the model of stage 1
#     TESTSET      folder in BEIR's format
# Options for sbatch go to all jobs but those that need one process. NEGATIVES (7): mined for each record.
# Prints one line a job: its number and what it does. Nothing waits here. A job that fails cancels those after it; one
# that requeues itself holds them. `scancel --name=NAME` with the printed name ends the chain.
set -euo pipefail
[ $# -ge 5 ] || { sed -n '2,5s/^# *//p' "$0"; exit 2; }
. examples/slurm/env.sh
stage1=$1 stage2=$2 records=$3 output=$4 testset=$5
shift 5
options=("$@")
one=(--nodes=1 --ntasks=1 --ntasks-per-node=1)
name=nvembed-$(basename "$output")
mkdir -p "$output"

# submit WHAT DEPENDENCY ARGUMENT...: prints the job's number. All jobs of a chain have one name, and `singleton` lets
# only one of that name run at a time, in the order of submission.
submit() {
    local what=$1 dependency=$2
    shift 2
    sbatch --parsable --job-name="$name" --output="$output/slurm-$what-%j.out" --kill-on-invalid-dep=yes \
        --dependency="${dependency}singleton" "${options[@]}" "$@"
}

first=$(submit stage1 '' examples/slurm/train.sbatch "$stage1" --run_dir "$output/stage1")
mine=$(submit mine "afterok:$first," examples/slurm/command.sbatch mine "$output/stage1" "$records" "$output/mined" \
    --negatives "${NEGATIVES:-7}")
second=$(submit stage2 "afterok:$mine," examples/slurm/train.sbatch "$stage2" --run_dir "$output/stage2" \
    --model.init_from "$output/stage1")
export_job=$(submit export "afterok:$second," "${one[@]}" examples/slurm/command.sbatch export-hf "$output/stage2" "$output/export")
evaluate=$(submit evaluate "afterok:$export_job," "${one[@]}" examples/slurm/command.sbatch evaluate "$output/export" \
    "$testset" --json "$output/scores.json")
printf '%s\n' "$first stage 1" "$mine mining" "$second stage 2" "$export_job export" "$evaluate evaluation" "name $name"

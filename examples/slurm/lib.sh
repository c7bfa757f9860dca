# shellcheck shell=bash
# Shell functions of the job scripts beside it; docs in README.md. They use from SLURM: SLURM_JOB_ID,
# SLURM_JOB_NODELIST, SLURM_RESTART_COUNT, and for an array SLURM_ARRAY_JOB_ID and SLURM_ARRAY_TASK_ID.

# What srun needs to start ranks in a container; container.sbatch sets it.
CONTAINER=()

say() { echo "$(date -u +%H:%M:%S) job $SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}: $*"; }

# --- Rendezvous ---

# numbers_of 01-03: 01 02 03, a line each.
numbers_of() {
    local first=${1%-*} last=${1#*-} number
    for ((number = 10#$first; number <= 10#$last; number++)); do printf "%0${#first}d\n" "$number"; done
}

# expand_part gpu-[1,4-6]: the hosts of one part of a node list, a line each.
expand_part() {
    local before after range number
    if ! [[ $1 =~ ^([^[]*)\[([^]]*)\](.*)$ ]]; then
        echo "$1"
        return
    fi
    before=${BASH_REMATCH[1]} after=${BASH_REMATCH[3]}
    for range in ${BASH_REMATCH[2]//,/ }; do
        for number in $(numbers_of "$range"); do expand_part "$before$number$after"; done
    done
}

# hosts_of 'gpu-[1,4-6],bigmem7': gpu-1 gpu-4 gpu-5 gpu-6 bigmem7, a line each; for where `scontrol` is missing, as in a
# container.
hosts_of() {
    local rest=$1
    while [ -n "$rest" ]; do
        # Up to the first comma that stands outside brackets.
        [[ $rest =~ ^([^][,]+(\[[0-9,-]+\][^][,]*)*|(\[[0-9,-]+\][^][,]*)+)(,(.+))?$ ]] || { echo "no node list: $1" >&2; return 1; }
        rest=${BASH_REMATCH[5]}
        expand_part "${BASH_REMATCH[1]}"
    done
}

# Rank 0 is on the first host of the list. Its name and not its address: a host has several. The port follows from the
# job, so that two jobs on one node have different ones. Both anew at each start: a requeued job gets other nodes.
rendezvous() {
    local hosts
    hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST" 2>/dev/null) || hosts=$(hosts_of "$SLURM_JOB_NODELIST")
    # The pre-flight check names a node that is silent from this list.
    export NVEMBED_HOSTS="${hosts//$'\n'/ }"
    export MASTER_ADDR=${hosts%%$'\n'*} MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
}

# --- Signals ---

# SLURM signals this shell before the time limit (--signal=B:USR1@300) and where it preempts (TERM). Traps are set
# before anything runs, and what runs is a child in the background, or the shell would notice only at its end.
child='' signals=0
pass_on_signals() { trap 'pass_on USR1' USR1; trap 'pass_on TERM' TERM; }

# srun hands a signal on to all its tasks. The trainer treats both the same: save and stop after this step.
pass_on() {
    signals=$((signals + 1))
    say "got $1: asking the run to save and stop"
    if [ -n "$child" ]; then kill -USR1 "$child" 2>/dev/null || true; fi
}

# Runs ranks in the background and sets `status`. A signal ends `wait` but not srun: wait again. One that came before
# the ranks could get it counts as their answer.
run_ranks() {
    local before
    status=75
    if [ "$signals" -gt 0 ]; then return; fi
    set_flags
    # srun itself and no function, whose shell would get the signal in its place.
    srun "${flags[@]}" "$@" &
    child=$!
    # One that came since the look above found no child to hand it to.
    if [ "$signals" -gt 0 ]; then kill -USR1 "$child" 2>/dev/null || true; fi
    while :; do
        before=$signals status=0
        wait "$child" || status=$?
        if [ "$signals" = "$before" ]; then break; fi
    done
    child=''
}

# --- The run ---

# What every srun here is told. One rank that ends badly ends all; so does the first that ends well, a minute later.
# CPUs are given again: a step does not inherit them since SLURM 22.05.
set_flags() {
    flags=(--kill-on-bad-exit=1 --wait=60 --export=ALL --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" "${CONTAINER[@]}")
}

# status_of NAME: a value of RUN/status.json, which has one key a line; nothing where there is none.
status_of() { sed -n "s/^ *\"$1\": *\"\{0,1\}\([^\",]*\).*/\1/p" "$run_dir/status.json" 2>/dev/null || true; }

samples_seen() { local samples; samples=$(status_of samples_seen); echo "${samples:-0}"; }

# begin CONFIG.yaml [--field value ...]: reads where the run is, makes the folder for this attempt's output.
begin() {
    pass_on_signals
    rendezvous
    set_flags
    status=0
    run_dir=$(srun "${flags[@]}" --nodes=1 --ntasks=1 --ntasks-per-node=1 python -m nvembed_mcore preflight "$@" --show run_dir) || status=$?
    if [ "$status" -ne 0 ]; then
        say "cannot read the configuration (status $status): $*"
        exit "$status"
    fi
    export ATTEMPT_DIR="$run_dir/logs/slurm-$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}"
    mkdir -p "$ATTEMPT_DIR"
    samples_before=$(samples_seen)
    say "$run_dir, ${SLURM_JOB_NUM_NODES:-1} node(s) $SLURM_JOB_NODELIST, output in $ATTEMPT_DIR"
}

# preflight CONFIG.yaml [--field value ...]: the check before the job, by the same ranks; ends the job where it fails.
preflight() {
    if [ "${PREFLIGHT:-1}" = 0 ]; then return; fi
    run_ranks --output="$ATTEMPT_DIR/preflight-%t.out" examples/slurm/rank.sh python -m nvembed_mcore preflight "$@"
    cat "$ATTEMPT_DIR/preflight-0.out" 2>/dev/null || true
    if [ "$status" -ne 0 ]; then finish; fi
}

# --- What happens then ---

# The status of the first rank that failed, where one could note it: srun and torchrun only say that something did.
first_status() {
    local noted=''
    if [ -r "$ATTEMPT_DIR/first-exit" ]; then read -r noted _ <"$ATTEMPT_DIR/first-exit"; fi
    if [ "$status" -ne 0 ] && [ -n "$noted" ]; then echo "$noted"; else echo "$status"; fi
}

# decide STATUS SIGNALLED FAILURES BEFORE AFTER: `done`, `requeue` or `end`, and why.
#   STATUS      of the first rank that failed, or 0
#   SIGNALLED   how many signals asked to stop: a run killed while it still started up was preempted all the same
#   FAILURES    of this job before this one
#   BEFORE AFTER    samples seen before and after this attempt
decide() {
    local status=$1 signalled=$2 failures=$3 before=$4 after=$5
    case $status in
        0) echo "done"; return ;;
        78) echo "end: the configuration or the data cannot work (78)"; return ;;
        65) echo "end: the loss is not a number, and would be again (65)"; return ;;
    esac
    if [ -e "$run_dir/STOP" ]; then
        echo "end: $run_dir/STOP is there; remove it and submit again to go on"
    elif [ "$status" = 75 ] || [ "$signalled" -gt 0 ]; then
        echo "requeue: preempted"
    elif [ "$failures" -ge "$MAX_FAILURES" ]; then
        echo "end: failed with $status, after $failures failures (MAX_FAILURES)"
    elif [ "$after" -le "$before" ]; then
        echo "end: failed with $status and made no progress ($after samples seen)"
    else
        echo "requeue: failed with $status, but made progress ($before to $after samples)"
    fi
}

# Not where somebody cancelled the job, or its time is over: then it is no longer RUNNING. A controller that is being
# restarted does not answer: ask again for five minutes.
is_running() {
    local facts
    for _ in {1..30}; do
        if facts=$(scontrol show job "$1"); then
            [[ $facts =~ JobState=RUNNING ]]
            return
        fi
        sleep 10
    done
    say "SLURM does not answer"
    return 1
}

requeue() {
    local job=$SLURM_JOB_ID
    if [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID; fi
    if ! is_running "$job"; then
        say "not requeued: the job was cancelled or its time is over"
        return
    fi
    # SLURM ends this shell then; an exit before that would look like the job's own end.
    trap 'exit 143' TERM
    scontrol requeue "$job"
    for _ in {1..300}; do sleep 0.2; done
}

# Failures of one job over its restarts, a line each: when, which status, which rank and host.
note_failure() {
    local what="$1, no rank could say why"
    if [ -r "$ATTEMPT_DIR/first-exit" ]; then what=$(<"$ATTEMPT_DIR/first-exit"); fi
    say "first to fail: $what; output in $ATTEMPT_DIR"
    echo "$(date -u +%FT%TZ) $what" >>"$run_dir/logs/slurm-$SLURM_JOB_ID-failures"
}
failures() {
    local lines=()
    mapfile -t lines 2>/dev/null <"$run_dir/logs/slurm-$SLURM_JOB_ID-failures" || true
    echo "${#lines[@]}"
}

# finish: ends the job with `status`, or requeues it.
finish() {
    local first verdict
    first=$(first_status)
    verdict=$(decide "$first" "$signals" "$(failures)" "$samples_before" "$(samples_seen)")
    say "$verdict"
    if [ "$first" != 0 ] && [ "$first" != 75 ]; then note_failure "$first"; fi
    after "$verdict"
    exit "$first"
}

# What a script does with the verdict; array.sbatch has its own.
after() { case $1 in requeue*) requeue ;; esac; }

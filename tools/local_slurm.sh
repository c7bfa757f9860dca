#!/usr/bin/env bash
# A real SLURM with two nodes, n1 and n2, on this one machine, to try examples/slurm/ without a cluster.
#   bash tools/local_slurm.sh up [DIR]       start it; then: export SLURM_CONF=DIR/slurm.conf
#   bash tools/local_slurm.sh status [DIR]   nodes and jobs; not 0 when it is not up
#   bash tools/local_slurm.sh down [DIR]     end its jobs and daemons, remove DIR
# Needs root on Debian or Ubuntu with the packages slurmctld, slurmd, slurm-client and munge (tools/ci_setup.sh). All
# that it writes is in DIR (default: nvembed-slurm in the folder for temporary files), but for one line in /etc/hosts,
# which `down` removes: the nodes find each other by name. Its ports and its munge socket are its own, so it disturbs no
# other SLURM. Both nodes have the cores of this machine and say that they have 64: keep jobs small, and submit with
# --gpus-per-node=0. When something fails, the logs in DIR say why.
set -euo pipefail

PACKAGES="slurmctld slurmd slurm-client munge"
SECONDS_TO_COME_UP=30

cannot() { echo "local_slurm: cannot: $*" >&2; exit 1; }

check_machine() {
    [ "$(id -u)" = 0 ] || cannot "the daemons need root, this is $(id -un)"
    command -v apt-get >/dev/null || cannot "written for Debian and Ubuntu, and there is no apt-get here"
    local program
    for program in slurmctld slurmd sbatch munged; do
        command -v "$program" >/dev/null || cannot "$program is missing: apt-get install --no-install-recommends $PACKAGES"
    done
    [ -w /etc/hosts ] || cannot "/etc/hosts cannot be written, and the nodes find each other by name"
}

in_use() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

# The first of three free ports in a row, looked for from a place that follows from DIR.
free_ports() {
    local port=$((17000 + $(cksum <<<"$dir" | cut -d' ' -f1) % 2000))
    while in_use "$port" || in_use "$((port + 1))" || in_use "$((port + 2))"; do port=$((port + 3)); done
    echo "$port"
}

# cred_expire is also how long a requeued job waits before it starts again: 2 minutes unless set, 5 seconds at least.
write_configuration() {
    local host port
    host=$(hostname -s)
    port=$(free_ports)
    cat >"$dir/slurm.conf" <<END
ClusterName=local
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
AuthType=auth/munge
AuthInfo=socket=$dir/munge.socket,cred_expire=5
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,sched_min_interval=200000,batch_sched_delay=0
ReturnToService=2
KillWait=5
JobRequeue=1
SlurmUser=root
SlurmdUser=root
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd-%n.pid
SlurmdSpoolDir=$dir/spool-%n
StateSaveLocation=$dir/state
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd-%n.log
NodeName=n[1-2] NodeHostname=$host NodeAddr=127.0.0.1 Port=[$((port + 1))-$((port + 2))] CPUs=64 State=UNKNOWN
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:16
END
    dd if=/dev/urandom of="$dir/munge.key" bs=1024 count=1 status=none
    chmod 400 "$dir/munge.key"
}

# /etc/hosts is often a mount of its own, so it is written in place and not replaced.
remove_names() {
    local rest
    rest=$(grep -vF "# local_slurm $dir" /etc/hosts || true)
    [ "$rest" = "$(cat /etc/hosts)" ] || printf '%s\n' "$rest" >/etc/hosts
}

add_names() {
    remove_names
    echo "127.0.0.1 n1 n2 $(hostname -s) # local_slurm $dir" >>/etc/hosts
}

start_daemons() {
    munged --force --socket="$dir/munge.socket" --key-file="$dir/munge.key" --pid-file="$dir/munged.pid" \
        --log-file="$dir/munged.log" --seed-file="$dir/munged.seed" 2>>"$dir/munged.err"
    slurmctld
    slurmd -N n1
    slurmd -N n2
}

nodes_idle() { [ "$(sinfo --noheader --Node --format=%T 2>/dev/null | grep -c '^idle$')" = 2 ]; }

up() {
    check_machine
    [ ! -e "$dir/slurm.conf" ] || cannot "$dir is in use: bash tools/local_slurm.sh down $dir"
    mkdir -p "$dir"/{state,spool-n1,spool-n2}
    chmod 755 "$dir"
    write_configuration
    add_names
    start_daemons || { down; cannot "a daemon did not start"; }
    local deadline=$((SECONDS + SECONDS_TO_COME_UP))
    until nodes_idle; do
        if [ "$SECONDS" -ge "$deadline" ]; then
            tail -n 5 "$dir"/*.log >&2
            down
            cannot "the nodes did not come up within $SECONDS_TO_COME_UP s; the logs end as above"
        fi
        sleep 0.2
    done
    echo "export SLURM_CONF=$dir/slurm.conf"
}

# Processes of this SLURM's jobs, and the ones that watch over them: both carry its SLURM_CONF and a job's number.
processes_of_jobs() {
    local file
    grep -lzsxF "SLURM_CONF=$SLURM_CONF" /proc/[0-9]*/environ | while read -r file; do
        if grep -qzs '^SLURM_JOB_ID=' "$file" || [ "$(cat "${file%environ}comm" 2>/dev/null)" = slurmstepd ]; then
            basename "${file%/environ}"
        fi
    done
}

# Ask, wait up to 3 s, kill.
end_processes() {
    local deadline=$((SECONDS + 3))
    kill "$@" 2>/dev/null || true
    while kill -0 "$@" 2>/dev/null && [ "$SECONDS" -lt "$deadline" ]; do sleep 0.1; done
    kill -KILL "$@" 2>/dev/null || true
}

down() {
    [ -e "$dir/slurm.conf" ] || { echo "local_slurm: not up in $dir"; return 0; }
    local file pids=()
    for file in "$dir"/slurmctld.pid "$dir"/slurmd-n[12].pid "$dir/munged.pid"; do
        if [ -e "$file" ]; then pids+=("$(cat "$file")"); fi
    done
    # The controller first, or it would start waiting jobs; then the jobs, or their nodes would wait for them.
    end_processes "${pids[0]:-}"
    mapfile -t jobs < <(processes_of_jobs)
    kill -KILL "${jobs[@]}" 2>/dev/null || true
    end_processes "${pids[@]:1}"
    remove_names
    rm -rf "$dir"
}

status() {
    [ -e "$dir/slurm.conf" ] || { echo "local_slurm: not up in $dir"; exit 1; }
    sinfo
    squeue
}

dir=$(realpath -m "${2:-${TMPDIR:-/tmp}/nvembed-slurm}")
export SLURM_CONF=$dir/slurm.conf
case "${1:-}" in
    up | down | status) "$1" ;;
    *) sed -n '2,5s/^# *//p' "$0"; exit 2 ;;
esac

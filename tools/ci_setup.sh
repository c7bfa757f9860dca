#!/usr/bin/env bash
# What a bare Debian or Ubuntu machine needs before tools/test.sh: the venv module, where Python comes without it, SLURM
# for the tests of examples/slurm/, and Chromium, in which reports are opened. The tests that need one of these two are
# skipped where it cannot be installed.
set -euo pipefail

packages=()
python3 -c 'import ensurepip' 2>/dev/null || packages+=(python3-venv)
command -v git >/dev/null || packages+=(git)
for_slurm=()
for program in slurmctld slurmd munged sbatch shellcheck; do
    command -v "$program" >/dev/null || for_slurm=(slurmctld slurmd slurm-client munge shellcheck)
done
for_reports=()
command -v chromium >/dev/null || for_reports=(chromium)
if [ ${#packages[@]} = 0 ] && [ ${#for_slurm[@]} = 0 ] && [ ${#for_reports[@]} = 0 ]; then exit 0; fi
export DEBIAN_FRONTEND=noninteractive
updated=0
apt-get update -q || updated=$?
if [ ${#packages[@]} -gt 0 ]; then apt-get install -y -q --no-install-recommends "${packages[@]}"; fi
if [ ${#for_slurm[@]} -gt 0 ]; then
    apt-get install -y -q --no-install-recommends "${for_slurm[@]}" ||
        echo "ci_setup: SLURM could not be installed (user $(id -un), apt-get update ended with $updated): its tests will be skipped" >&2
fi
if [ ${#for_reports[@]} -gt 0 ]; then
    apt-get install -y -q --no-install-recommends "${for_reports[@]}" ||
        echo "ci_setup: Chromium could not be installed (user $(id -un), apt-get update ended with $updated): its tests will be skipped" >&2
fi

#!/usr/bin/env bash
# A SLURM of one node, this machine, to try `benchmarks/reproduce.py --slurm` without a cluster.
#
#   apt-get install --no-install-recommends slurm-wlm     # Debian, Ubuntu; as root, as below
#   benchmarks/slurm/single_node.sh start FOLDER          # then: export SLURM_CONF=FOLDER/slurm.conf
#   benchmarks/slurm/single_node.sh stop FOLDER
#
# FOLDER keeps key, configuration, state and logs of munged, slurmctld and slurmd. There is no
# accounting data base (so no sacct) and no systemd; all jobs run as root. Not for a real cluster.
set -euo pipefail

usage() {
    echo "error: $0 start|stop FOLDER is wanted, not '$*'" >&2
    exit 2
}

start() {
    for program in munged slurmctld slurmd; do
        command -v "$program" > /dev/null || {
            echo "error: no $program here; apt-get install --no-install-recommends slurm-wlm" >&2
            exit 2
        }
    done
    [ "$(id -u)" = 0 ] || { echo "error: slurmd needs root; start this as root" >&2; exit 2; }
    mkdir -p "$folder"/{munge,state,spool}
    chmod 755 "$folder"
    chmod 700 "$folder/munge"
    [ -f "$folder/munge/key" ] || (umask 077 && head -c 1024 /dev/urandom > "$folder/munge/key")
    # munged insists on folders that only root can write; --force warns where /tmp is above them.
    munged --force --key-file="$folder/munge/key" --socket="$folder/munge.socket" \
        --pid-file="$folder/munged.pid" --log-file="$folder/munged.log" \
        --seed-file="$folder/munge/seed"
    host=$(hostname -s)
    memory=$(awk '/MemTotal/ {print int($2 / 1024 * 0.9)}' /proc/meminfo)  # MB
    cat > "$folder/slurm.conf" << CONF
ClusterName=single
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=16817
SlurmdPort=16818
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket
CredType=cred/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0
JobRequeue=1
ReturnToService=2
KillWait=30
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(nproc) RealMemory=$memory State=UNKNOWN
PartitionName=main Nodes=$host Default=YES MaxTime=INFINITE State=UP
CONF
    export SLURM_CONF="$folder/slurm.conf"
    slurmctld
    slurmd
    for _ in $(seq 60); do
        if [ "$(sinfo --noheader --format=%t 2> /dev/null)" = idle ]; then
            sinfo
            echo "ready: export SLURM_CONF=$SLURM_CONF"
            return
        fi
        sleep 1
    done
    echo "error: the node is not idle after a minute; see $folder/*.log" >&2
    exit 1
}

stop() {
    for program in slurmd slurmctld munged; do
        [ -f "$folder/$program.pid" ] && kill "$(cat "$folder/$program.pid")" || true
    done
}

[ $# = 2 ] || usage "$@"
folder=$(realpath -m "$2")
case $1 in
    start) start ;;
    stop) stop ;;
    *) usage "$@" ;;
esac

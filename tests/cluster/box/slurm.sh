#!/bin/bash
# Slurm on the hosts of nodes.sh: slurmctld on "login", slurmd on node1 and node2, each with 8 pretended GPUs; a munged of its own.
#   slurm.sh up | down | slurmd NODE   (then: nodes.sh on login sbatch ...; SLURM_CONF is in the environment of every job)
# Debian: slurmctld slurmd slurm-client munge
set -euo pipefail
N=$(dirname "$0")/nodes.sh
S=${SLURM_BOX:-${TMPDIR:-/var/tmp}/slurm-box}
conf() {
    mkdir -p $S/state $S/spool-node1 $S/spool-node2 $S/log
    cat > $S/slurm.conf <<CONF
ClusterName=box
SlurmctldHost=login
SlurmUser=root
AuthType=auth/munge
AuthInfo=cred_expire=5,socket=$S/munge/socket
StateSaveLocation=$S/state
SlurmdSpoolDir=$S/spool-%n
SlurmctldPidFile=$S/slurmctld.pid
SlurmdPidFile=$S/slurmd-%n.pid
SlurmctldLogFile=$S/log/slurmctld.log
SlurmdLogFile=$S/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=20
KillWait=30
MinJobAge=3600
OverTimeLimit=0
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=5
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/filetxt
JobCompLoc=$S/log/jobcomp.txt
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
${EXTRA_CONF:-}
NodeName=node1 NodeAddr=10.88.0.1 CPUs=16 RealMemory=16000 Gres=gpu:8 State=UNKNOWN
NodeName=node2 NodeAddr=10.88.0.2 CPUs=16 RealMemory=16000 Gres=gpu:8 State=UNKNOWN
PartitionName=main Nodes=node1,node2 Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=urgent Nodes=node1,node2 MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
CONF
    for i in 0 1 2 3 4 5 6 7; do echo "Name=gpu File=$S/gpu$i"; touch $S/gpu$i; done > $S/gres.conf
}
slurmd() { $N on $1 env SLURM_CONF=$S/slurm.conf slurmd -N $1; }
case $1 in
    up) conf
        mkdir -p $S/munge; chmod 700 $S/munge; [ -f $S/munge/key ] || (umask 077; head -c 128 /dev/urandom > $S/munge/key)
        $N on login munged --force --key-file=$S/munge/key --socket=$S/munge/socket --pid-file=$S/munge/pid --seed-file=$S/munge/seed --log-file=$S/munge/log
        $N on login env SLURM_CONF=$S/slurm.conf slurmctld
        slurmd node1; slurmd node2;;
    slurmd) slurmd $2;;
    down) for pid in $S/slurmd-node1.pid $S/slurmd-node2.pid $S/slurmctld.pid $S/munge/pid; do [ -f $pid ] && kill $(cat $pid) || true; done;;
esac

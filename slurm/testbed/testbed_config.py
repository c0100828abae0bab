"""Writes the texts of a testbed cluster's configuration files."""

from __future__ import annotations

import getpass
import socket

from testbed_folder import Layout, Shape

CLUSTER = "testbed"
ACCOUNT = "lab"
DATABASE_USER = "slurm"


def numbered(prefix: str, first: int, count: int) -> str:
    """Returns Slurm's short form of numbered names, such as `n[1-4]`."""
    return f"{prefix}{first}" if count == 1 else f"{prefix}[{first}-{first + count - 1}]"


def slurm_conf(layout: Layout, shape: Shape, port: int) -> str:
    """Returns the text of slurm.conf; `port` is the first of the cluster's ports."""
    root, user = layout.root, getpass.getuser()
    host = socket.gethostname().partition(".")[0]
    nodes = numbered("n", 1, shape.nodes)
    node_ports = f"{port + 3}" if shape.nodes == 1 else f"{port + 3}-{port + 2 + shape.nodes}"
    gres = f" Gres=gpu:{shape.gpus}" if shape.gpus else ""
    if shape.accounting:
        # Without the socket here too, clients of slurmdbd hang.
        accounting = f"""\
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={port + 1}
AccountingStoragePass={layout.munge_socket}
AccountingStorageEnforce=associations,limits,qos
AccountingStorageTRES=gres/gpu"""
    else:
        accounting = "AccountingStorageType=accounting_storage/none"
    # cred_expire: a requeued job waits until its old credential expires, by default two minutes.
    # config_overrides: nodes may claim more CPUs and memory than the machine has.
    # DefMemPerCPU: small, so that a job has to request the memory that it needs.
    return f"""\
ClusterName={CLUSTER}
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={layout.munge_socket},cred_expire=5
CredType=cred/munge
SlurmctldPort={port}
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/slurmd-%n.pid
SlurmctldLogFile={layout.log("slurmctld")}
SlurmdLogFile={layout.log("slurmd-%n")}
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
ReturnToService=2
GresTypes=gpu
JobRequeue=1
MaxArraySize=20001
MaxJobCount=50000
MinJobAge=300
SlurmctldTimeout=30
SlurmdTimeout=10
InactiveLimit=0
KillWait=5
MessageTimeout=30
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_min_interval=0,batch_sched_delay=0
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill
DefMemPerCPU=100
{accounting}
NodeName={nodes} NodeHostname={host} NodeAddr=127.0.0.1 Port={node_ports} \
CPUs={shape.cpus} RealMemory={shape.memory_mb}{gres} State=UNKNOWN
PartitionName=main Nodes={nodes} Default=YES MaxTime=INFINITE DefaultTime=60 State=UP \
PriorityTier=10
PartitionName=high Nodes={nodes} MaxTime=INFINITE DefaultTime=60 State=UP PriorityTier=100 \
PreemptMode=OFF
"""


def gres_conf(layout: Layout, shape: Shape) -> str:
    """Returns the text of gres.conf."""
    if not shape.gpus:
        return ""
    files = numbered(f"{layout.root}/dev/fakegpu", 0, shape.gpus)
    return f"NodeName={numbered('n', 1, shape.nodes)} Name=gpu File={files}\n"


def slurmdbd_conf(layout: Layout, port: int, password: str) -> str:
    """Returns the text of slurmdbd.conf."""
    return f"""\
AuthType=auth/munge
AuthInfo=socket={layout.munge_socket}
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={port + 1}
SlurmUser={getpass.getuser()}
PidFile={layout.root}/run/slurmdbd.pid
LogFile={layout.log("slurmdbd")}
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={port + 2}
StorageUser={DATABASE_USER}
StoragePass={password}
StorageLoc=slurm_acct_db
"""


def database_setup(password: str) -> str:
    """Returns SQL that creates slurmdbd's database and user; one statement per line."""
    user = f"'{DATABASE_USER}'@'127.0.0.1'"
    return (
        "CREATE DATABASE IF NOT EXISTS slurm_acct_db;\n"
        f"CREATE OR REPLACE USER {user} IDENTIFIED BY '{password}';\n"
        f"GRANT ALL ON slurm_acct_db.* TO {user};\n"
    )

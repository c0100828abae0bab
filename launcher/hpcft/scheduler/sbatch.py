"""What is asked of sbatch: submitit's parameters, and the script that they make."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hpcft.core.log_markers import SETUP_BEGINS, SETUP_ENDS
from hpcft.core.records import Cluster, Plan

# Points of one array that run at a time; submitit's own default.
ARRAY_PARALLELISM = 256


def job_parameters(
    cluster: Cluster, plan: Plan, job_name: str, token: str, exclude: Sequence[str] = ()
) -> dict[str, Any]:
    """Submitit's parameters for a run: everything that becomes a line of the sbatch script."""
    layout = plan.layout
    gpu_type = cluster.gpu.type if cluster.gpu else None
    count = layout.ranks_per_node
    typed = f"{gpu_type}:{count}" if gpu_type else count
    gpus: dict[str, Any] = {}
    if cluster.gpus_per_node and cluster.gpu_request == "gpus_per_node":
        gpus = {"gpus_per_node": typed}
    elif cluster.gpus_per_node and cluster.gpu_request == "gres":
        gpus = {"gres": f"gpu:{typed}"}
    return {
        "job_name": job_name,
        "comment": token,
        "time": plan.time_min,
        "nodes": layout.nodes,
        "ntasks_per_node": layout.ranks_per_node,
        "cpus_per_task": plan.cpus_per_task,
        "mem": f"{plan.mem_mib}M",
        "partition": plan.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "exclude": ",".join(exclude) or None,
        "signal_delay_s": plan.signal_delay_s,
        "additional_parameters": {"requeue": True},
        "setup": _setup_lines(cluster),
        # A job that starts again keeps what its earlier starts have said.
        "srun_args": [
            "--open-mode=append",
            "--kill-on-bad-exit=1",
            "--wait=60",
            *cluster.srun_args,
        ],
        "array_parallelism": ARRAY_PARALLELISM,
        "wckey": None,  # submitit's default "submitit" is refused where wckeys are enforced
        **gpus,
    }


def _setup_lines(cluster: Cluster) -> list[str]:
    exports = [f"export {key}={shlex.quote(value)}" for key, value in cluster.environment.items()]
    # Without `set -e` a failing `module load` goes unnoticed and the job runs in the wrong place.
    begins, ends = (f"echo {shlex.quote(mark)} >&2" for mark in (SETUP_BEGINS, SETUP_ENDS))
    guarded = [begins, "set -e", *cluster.setup, "set +e", ends] if cluster.setup else []
    # Since Slurm 22.05 srun does not inherit --cpus-per-task from sbatch.
    return [*guarded, *exports, "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK"]


def runs_file(folder: Path, options: dict[str, Any]) -> Path:
    """Names the run folder of each element, for the batch script."""
    return folder / f"runs-{options['comment']}.json"


def submitit_kwargs(folder: Path, options: dict[str, Any], cluster: Cluster) -> dict[str, Any]:
    """The options that have a value, with the lines after srun."""
    ended = f"-m hpcft.training.requeue {shlex.quote(str(runs_file(folder, options)))}"
    teardown = ["code=$?", f"[ $code -eq 0 ] || {_python(cluster)} {ended}", "exit $code"]
    kept = {key: value for key, value in options.items() if value is not None or key == "wckey"}
    return {**kept, "setup": [*kept["setup"], _link_pickle(folder, options)], "teardown": teardown}


def _link_pickle(folder: Path, options: dict[str, Any]) -> str:
    """Shell that gives the job what it runs, even if the command that queued it was killed.

    Submitit names the file of what a job runs after the job, when sbatch has told its id; until
    then, maybe for ever, the job would wait.
    """
    element = "${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"
    job = "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}" + element
    file = f"{options['comment']}{element}.pkl"
    return f"ln -s {file} {shlex.quote(str(folder))}/{job}_submitted.pkl 2>/dev/null || true"


def _python(cluster: Cluster) -> str:
    return cluster.python or shlex.quote(sys.executable)


def sbatch_script(folder: Path, options: dict[str, Any], cluster: Cluster, count: int) -> str:
    """The script that submitit would write; an array where `count` is more than one."""
    from submitit.slurm.slurm import _make_sbatch_string

    command = f"{_python(cluster)} -u -m submitit.core._submit {shlex.quote(str(folder))}"
    all_ = submitit_kwargs(folder, options, cluster)
    if count > 1:
        all_["map_count"] = count
    return str(_make_sbatch_string(command=command, folder=folder, **all_))

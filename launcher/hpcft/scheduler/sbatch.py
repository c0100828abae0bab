"""Makes the sbatch script of a job: submitit's parameters, and the lines around srun."""

from __future__ import annotations

import hashlib
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from hpcft.core.log_markers import SETUP_BEGIN_LINE, SETUP_END_LINE
from hpcft.core.records import Cluster
from hpcft.scheduler.job_environment import PYTHON_VARIABLES
from hpcft.scheduler.protocol import JobRequest

ARRAY_PARALLELISM = 256
"""Most elements of a job array that run at a time; submitit's own default."""


def job_parameters(request: JobRequest) -> dict[str, Any]:
    """Returns submitit's parameters of a job: everything that becomes a line of the script."""
    cluster, plan = request.cluster, request.plan
    ranks = plan.layout.ranks_per_node
    gpu_type = cluster.gpu.type if cluster.gpu else None
    typed_ranks = f"{gpu_type}:{ranks}" if gpu_type else ranks
    gpus: dict[str, Any] = {}
    if cluster.gpus_per_node and cluster.gpu_request == "gpus_per_node":
        gpus = {"gpus_per_node": typed_ranks}
    elif cluster.gpus_per_node and cluster.gpu_request == "gres":
        gpus = {"gres": f"gpu:{typed_ranks}"}
    return {
        "job_name": request.name,
        "comment": request.token,
        "time": plan.time_min,
        "nodes": plan.layout.nodes,
        "ntasks_per_node": ranks,
        "cpus_per_task": plan.cpus_per_task,
        "mem": f"{plan.mem_mib}M",
        "partition": plan.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "exclude": ",".join(request.exclude) or None,
        "signal_delay_s": plan.signal_delay_s,
        # Without `propagate`, soft limits of the session (`ulimit -St 5`) hold in the job too.
        "additional_parameters": {"requeue": True, "propagate": "NONE"},
        "setup": _setup_lines(cluster),
        "srun_args": [
            "--open-mode=append",  # A restarted job keeps the logs of its earlier starts.
            "--kill-on-bad-exit=1",
            "--wait=60",
            *cluster.srun_args,
        ],
        "array_parallelism": ARRAY_PARALLELISM,
        "wckey": None,  # Sites that enforce wckeys refuse submitit's default, "submitit".
        **gpus,
    }


def _setup_lines(cluster: Cluster) -> list[str]:
    variables = PYTHON_VARIABLES | cluster.environment
    exports = [f"export {key}={shlex.quote(value)}" for key, value in variables.items()]
    # Without `set -e` a failing `module load` goes unnoticed, and the job runs without the module.
    begin, end = (f"echo {shlex.quote(line)} >&2" for line in (SETUP_BEGIN_LINE, SETUP_END_LINE))
    guarded = [begin, "set -e", *cluster.setup, "set +e", end] if cluster.setup else []
    # Since Slurm 22.05 srun does not inherit --cpus-per-task from sbatch.
    return [*guarded, *exports, "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK"]


def runs_file(request: JobRequest) -> Path:
    """Returns the file that lists the run folder of each element of the job array."""
    return request.logs / f"runs-{request.token}.json"


def runs_text(request: JobRequest) -> str:
    """Returns the content of that file."""
    return json.dumps([str(run) for run in request.runs])


def rank_command(request: JobRequest, python: str) -> str:
    """Returns the command of a rank, which runs what is submitted and no file that is put there.

    Args:
        request: the job.
        python: command of the shell that starts Python.
    """
    arguments = f"{shlex.quote(str(request.logs))} {_runs_arguments(request)}"
    return f"{python} -u -m hpcft.training.start_rank {arguments}"


def _runs_arguments(request: JobRequest) -> str:
    digest = hashlib.sha256(runs_text(request).encode()).hexdigest()
    return f"{shlex.quote(str(runs_file(request)))} {digest}"


def submitit_kwargs(request: JobRequest) -> dict[str, Any]:
    """Returns the parameters that have a value, with the lines before and after srun."""
    requeue = f"-m hpcft.training.requeue {_runs_arguments(request)}"
    teardown = ["code=$?", f"[ $code -eq 0 ] || {_python(request.cluster)} {requeue}", "exit $code"]
    parameters = job_parameters(request)
    kept = {key: value for key, value in parameters.items() if value is not None or key == "wckey"}
    return {**kept, "teardown": teardown}


def _python(cluster: Cluster) -> str:
    return cluster.python or shlex.quote(sys.executable)


def sbatch_script(request: JobRequest) -> str:
    """Returns the script that submitit writes for a request; an array if it has several runs."""
    from submitit.slurm.slurm import _make_sbatch_string

    parameters = submitit_kwargs(request)
    if len(request.runs) > 1:
        parameters["map_count"] = len(request.runs)
    command = rank_command(request, _python(request.cluster))
    return str(_make_sbatch_string(command=command, folder=request.logs, **parameters))

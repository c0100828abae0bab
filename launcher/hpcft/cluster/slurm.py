"""Slurm: what is asked of sbatch through submitit, and the only calls of scheduler commands."""

from __future__ import annotations

import contextlib
import getpass
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hpcft.cluster.states import PENDING, JobState, explained, normalised
from hpcft.errors import ClusterError
from hpcft.records import Cluster, Plan
from hpcft.units import parse_slurm_duration_s

TIMEOUT_S = 30  # clients wait for an absent slurmctld until their own time-out: set one
# Points of one array that run at a time; submitit's own default.
ARRAY_PARALLELISM = 256


def _run(*command: str, timeout_s: float = TIMEOUT_S) -> str:
    """Standard output of a scheduler command.

    Raises:
        ClusterError: it is missing, failed, or did not answer in time.
    """
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
            errors="replace",
        )
    except FileNotFoundError:
        raise ClusterError(f"{command[0]} is not on PATH: is this a Slurm login node?") from None
    except subprocess.TimeoutExpired:
        raise ClusterError(f"{command[0]} did not answer within {timeout_s:.0f} s") from None
    if done.returncode:
        said = done.stderr.strip() or done.stdout.strip()
        raise ClusterError(f"{command[0]} failed ({done.returncode}): {said}")
    return done.stdout


def cluster_name() -> str | None:
    """What Slurm calls this cluster; None where there is no Slurm."""
    if shutil.which("scontrol") is None or shutil.which("sbatch") is None:
        return None
    try:
        config = _run("scontrol", "show", "config", timeout_s=10)
    except ClusterError as error:
        if "resolve" in str(error) or "configuration" in str(error) or "config" in str(error):
            return None  # the client programs are installed, but no cluster is configured
        raise
    match = re.search(r"^ClusterName\s*=\s*(\S+)", config, re.MULTILINE)
    return match[1] if match else None


def node_address(node: str) -> str:
    """The address under which a node is known to Slurm (`NodeAddr`)."""
    text = _run("scontrol", "show", "node", node, "--oneliner")
    match = re.search(r"\bNodeAddr=(\S+)", text)
    if not match:
        raise ClusterError(f"scontrol tells no NodeAddr of node {node}")
    return match[1]


# ---------------------------------------------------------------- submitting


def parameters(cluster: Cluster, plan: Plan, job_name: str, token: str) -> dict[str, Any]:
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
        "setup": _setup_lines(cluster),
        "srun_args": ["--kill-on-bad-exit=1", "--wait=60", *cluster.srun_args],
        "array_parallelism": ARRAY_PARALLELISM,
        "wckey": None,  # submitit's default "submitit" is refused where wckeys are enforced
        **gpus,
    }


def _setup_lines(cluster: Cluster) -> list[str]:
    exports = [f"export {key}={shlex.quote(value)}" for key, value in cluster.environment.items()]
    # Without `set -e` a failing `module load` goes unnoticed and the job runs in the wrong place.
    guarded = ["set -e", *cluster.setup, "set +e"] if cluster.setup else []
    # Since Slurm 22.05 srun does not inherit --cpus-per-task from sbatch.
    return [*guarded, *exports, "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK"]


def sbatch_script(folder: Path, options: dict[str, Any], cluster: Cluster, count: int) -> str:
    """The script that submitit would write; an array where `count` is more than one."""
    import sys

    from submitit.slurm.slurm import _make_sbatch_string

    python = cluster.python or shlex.quote(sys.executable)
    command = f"{python} -u -m submitit.core._submit {shlex.quote(str(folder))}"
    given = {key: value for key, value in options.items() if value is not None or key == "wckey"}
    if count > 1:
        given["map_count"] = count
    return str(_make_sbatch_string(command=command, folder=folder, **given))


class Refused(Exception):
    """Slurm would not take a job; `key` is the profile's field that is to blame, if one is."""

    def __init__(self, reason: str, asked: str) -> None:
        super().__init__(reason)
        self.reason = f"{reason}, asked for {asked}"
        self.key = next((key for word, key in _BLAME if word in reason.lower()), "name")
        self.fix = "correct the profile, or the recipe's resources"


# Word in a refusal to the profile's field; the first that matches wins.
_BLAME = (
    ("accounting/qos policy", "qos"),
    ("account", "account"),
    ("partition", "partition"),
    ("qos", "qos"),
    ("feature", "constraint"),
    ("time limit", "time_limit_min"),
    ("memory", "host_memory_gib"),
    ("processors", "cores_per_node"),
    ("cpu count", "cores_per_node"),
    ("generic resource", "gpu_request"),
    ("trackable resource", "gpu_request"),
    ("node configuration", "gpus_per_node"),
    ("node count", "max_nodes"),
)


def check(script: str) -> None:
    """Asks Slurm whether it would take the script (`sbatch --test-only`); nothing is queued.

    Raises:
        Refused: it would not (partition, account, time, more than a node has).
        ClusterError: Slurm does not answer.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".sh", prefix="hpcft-") as file:
        file.write(script)
        file.flush()
        try:
            _run("sbatch", "--test-only", file.name)
        except ClusterError as error:
            reason = _refusal(str(error))
            if reason is None:
                raise
            # Nodes that are away for now look like nodes that lack something: sbatch, which
            # refuses only what can never run, then decides.
            if not (reason.startswith("Requested node") and _nodes_are_away()):
                raise Refused(reason, _asked(script)) from None


def _refusal(said: str) -> str | None:
    """Why Slurm refuses a job, from what a client printed; None where it is another trouble."""
    for words in ("allocation failure:", "submission failed:"):
        if words in said and "contact" not in said:
            return said.split(words)[-1].strip()
    return None


def _nodes_are_away() -> bool:
    return bool(_run("sinfo", "-h", "-N", "-t", "down,drain,fail,maint,unk", "-o", "%N").strip())


def _asked(script: str) -> str:
    lines = [line.removeprefix("#SBATCH ") for line in script.splitlines()]
    keep = ("--partition", "--account", "--qos", "--constraint", "--nodes", "--ntasks-per-node",
            "--gpus-per-node", "--gres", "--mem", "--time", "--cpus-per-task")  # fmt: skip
    return " ".join(line for line in lines if line.startswith(keep))


def submit(
    folder: Path, options: dict[str, Any], cluster: Cluster, entry: Any, runs: list[Path]
) -> list[str]:
    """Submits one job, or one array for several runs.

    Args:
        folder: where submitit keeps script, pickles and logs.
        options: from `parameters`.
        cluster: the profile.
        entry: importable callable that takes a run folder as text; it travels by reference.
        runs: run folders, one for each element.

    Returns:
        A job id for each run, `123` or `123_4`.

    Raises:
        Refused: Slurm will never run it.
        ClusterError: sbatch failed otherwise.
    """
    from submitit import SlurmExecutor
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    executor = SlurmExecutor(folder=folder, python=cluster.python)
    executor.update_parameters(
        **{k: v for k, v in options.items() if v is not None or k == "wckey"}
    )
    try:
        jobs = (
            [executor.submit(entry, str(runs[0]))]
            if len(runs) == 1
            else executor.map_array(entry, [str(run) for run in runs])
        )
    except (FailedJobError, FailedSubmissionError) as error:
        reason = _refusal(str(error))
        if reason is not None:
            raise Refused(reason.splitlines()[0], "the script of the dry run") from None
        raise ClusterError(f"sbatch failed: {error}") from None
    return [job.job_id for job in jobs]


# Slurm sets them in a job for the GPUs that it got.
_GPUS_OF_A_JOB = ("CUDA_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL", "ROCR_VISIBLE_DEVICES",
                  "ZE_AFFINITY_MASK")  # fmt: skip


@contextlib.contextmanager
def outside_of_its_job() -> Iterator[None]:
    """Lets a job submit another one as a login node would: the other inherits nothing of it."""
    from submitit.helpers import clean_env

    where = os.environ.get("SLURM_CONF")
    with clean_env(_GPUS_OF_A_JOB):
        if where is not None:
            os.environ["SLURM_CONF"] = where  # of the cluster, not of the job
        yield


# ---------------------------------------------------------------- asking


def states(job_ids: list[str]) -> dict[str, JobState]:
    """The state of each job: one squeue call, and one sacct call for those that it has forgotten.

    With accounting down squeue still knows recent jobs; what nobody knows is UNKNOWN, with the
    reason, and never «failed».
    """
    if not job_ids:
        return {}
    trouble: list[str] = []
    found: dict[str, JobState] = {}
    try:
        found = _squeue(job_ids)
    except ClusterError as error:
        trouble.append(str(error))
    missing = [job_id for job_id in job_ids if job_id not in found]
    if missing:
        try:
            found |= _sacct(missing)
        except ClusterError as error:
            trouble.append(str(error))
    reason = "; ".join(trouble) or "neither squeue nor sacct knows the job"
    return {job_id: found.get(job_id, JobState("UNKNOWN", reason)) for job_id in job_ids}


def _squeue(job_ids: list[str]) -> dict[str, JobState]:
    # Asked by user: with `-j`, one forgotten id makes squeue fail for all.
    text = _run("squeue", "-h", "-r", "-t", "all", "-u", getpass.getuser(), "-o", "%i|%T|%M|%N|%r")
    return parse_squeue(text, set(job_ids))


def parse_squeue(text: str, wanted: set[str]) -> dict[str, JobState]:
    """States from lines of `squeue -o "%i|%T|%M|%N|%r"`."""
    found = {}
    for line in text.splitlines():
        job_id, state, elapsed, nodes, reason = [*line.split("|", 4), "", "", "", ""][:5]
        if job_id in wanted:
            word = normalised(state)
            why = explained(reason) if word in PENDING else ""
            found[job_id] = JobState(word, why, nodes, parse_slurm_duration_s(elapsed))
    return found


def _sacct(job_ids: list[str]) -> dict[str, JobState]:
    whole = sorted({job_id.split("_")[0] for job_id in job_ids})
    fields = "JobID,State,ExitCode,Elapsed,NodeList"
    text = _run("sacct", "-X", "-P", "-n", "-j", ",".join(whole), "-o", fields)
    return parse_sacct(text, set(job_ids))


def parse_sacct(text: str, wanted: set[str]) -> dict[str, JobState]:
    """States from lines of `sacct -X -P -n -o JobID,State,ExitCode,Elapsed,NodeList`."""
    found = {}
    for line in text.splitlines():
        name, state, exit_code, elapsed, nodes = [*line.split("|"), "", "", "", ""][:5]
        for job_id in _elements(name) & wanted:
            found[job_id] = JobState(
                normalised(state), "", nodes, parse_slurm_duration_s(elapsed), exit_code
            )
    return found


def _elements(name: str) -> set[str]:
    """Job ids behind a JobID of sacct, which keeps waiting elements together: `12_[3-5,8%2]`."""
    match = re.fullmatch(r"(\d+)_\[([\d,-]+)(?:%\d+)?\]", name)
    if not match:
        return {name}
    spans = [part.partition("-") for part in match[2].split(",")]
    return {
        f"{match[1]}_{index}"
        for first, _, last in spans
        for index in range(int(first), int(last or first) + 1)
    }


def find_by_token(token: str, array_index: int | None = None) -> str | None:
    """Id of the live or recent job, or array element, whose comment is `token`; None if none is."""
    text = _run("squeue", "-h", "-r", "-t", "all", "-u", getpass.getuser(), "-o", "%i|%k")
    for line in text.splitlines():
        job_id, _, comment = line.partition("|")
        if comment.strip() == token and (array_index is None or job_id.endswith(f"_{array_index}")):
            return job_id
    return None


def cancel(job_id: str) -> None:
    """Cancels a job or one element of an array."""
    _run("scancel", job_id)

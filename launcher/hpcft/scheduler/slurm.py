"""Slurm: what is asked of sbatch through submitit, and the only calls of scheduler commands."""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import re
import shutil
import subprocess
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from hpcft.core.errors import ClusterError
from hpcft.core.records import Cluster
from hpcft.core.units import parse_slurm_duration_s
from hpcft.scheduler.job_state import RESTARTABLE, UNKNOWN, JobState
from hpcft.scheduler.sbatch import job_parameters, runs_file, sbatch_script, submitit_kwargs
from hpcft.scheduler.slurm_output import (
    SACCT_FIELDS,
    SQUEUE_FIELDS,
    Refused,
    TooManyJobs,
    parse_refusal,
    parse_sacct,
    parse_squeue,
)

__all__ = ["Refused", "TooManyJobs", "job_parameters", "sbatch_script"]  # of use with what is here

TIMEOUT_S = 30  # clients wait for an absent slurmctld until their own time-out: set one


def _run(*command: str, timeout_s: float | None = None, stdin: str | None = None) -> str:
    """Standard output of a scheduler command, which may be given what to read.

    Raises:
        ClusterError: it is missing, failed, or did not answer in time.
    """
    timeout_s = timeout_s or TIMEOUT_S
    try:
        done = subprocess.run(
            command,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
            errors="replace",
            env=_environment(),
        )
    except FileNotFoundError:
        raise ClusterError(f"{command[0]} is not on PATH: is this a Slurm login node?") from None
    except subprocess.TimeoutExpired:
        raise ClusterError(f"{command[0]} did not answer within {timeout_s:.0f} s") from None
    if done.returncode:
        said = done.stderr.strip() or done.stdout.strip()
        raise ClusterError(f"{command[0]} failed ({done.returncode}): {said}")
    return done.stdout


def _environment() -> dict[str, str]:
    """This process's, without what a user sets to have squeue and sacct show less."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SQUEUE_", "SACCT_"))}
    return kept | {"SLURM_TIME_FORMAT": "%s", "SLURM_BITSTR_LEN": "0"}  # no list is shortened


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


def max_array_size() -> int | None:
    """The most elements that Slurm takes in one array (MaxArraySize); None where nobody says."""
    try:
        config = _run("scontrol", "show", "config")
    except ClusterError:
        return None
    match = re.search(r"^MaxArraySize\s*=\s*(\d+)", config, re.MULTILINE)
    return max(int(match[1]), 1) if match else None  # 0: arrays are switched off


def node_address(node: str) -> str:
    """The address under which a node is known to Slurm (`NodeAddr`)."""
    text = _run("scontrol", "show", "node", node, "--oneliner")
    match = re.search(r"\bNodeAddr=(\S+)", text)
    if not match:
        raise ClusterError(f"scontrol tells no NodeAddr of node {node}")
    return match[1]


# ---------------------------------------------------------------- submitting

# What a site or a user may have set for all of their jobs.
_DEFAULTS = {
    name: f"SBATCH_{name.upper()}"
    for name in ("account", "constraint", "partition", "qos", "reservation")
}


@contextlib.contextmanager
def _without_sbatch_env(asked: Collection[str]) -> Iterator[None]:
    """Without the variables that sbatch prefers to the script; defaults fill what it leaves open.

    Args:
        asked: options that the script has.
    """
    kept = {variable for name, variable in _DEFAULTS.items() if name not in asked}
    names = [name for name in os.environ if name.startswith("SBATCH_") and name not in kept]
    hidden = {name: os.environ.pop(name) for name in names}
    try:
        yield
    finally:
        os.environ.update(hidden)


def check_script(script: str) -> None:
    """Asks Slurm whether it would take the script (`sbatch --test-only`); nothing is queued.

    Raises:
        Refused: it would not (partition, account, time, more than a node has).
        TooManyJobs: it would take it, but not now.
        ClusterError: Slurm does not answer.
    """
    try:
        with _without_sbatch_env(_options(script)):
            _run("sbatch", "--test-only", stdin=script)
    except ClusterError as error:
        refusal = parse_refusal(str(error), _asked(script))
        if refusal is None:
            raise
        # Nodes that are away for now look like nodes that lack something: sbatch, which
        # refuses only what can never run, then decides.
        if not (str(refusal).startswith("Requested node") and _nodes_are_away()):
            raise refusal from None
    _check_time(script)


def _check_time(script: str) -> None:
    """Refuses what exceeds the partition's limit, which by default Slurm lets pend for ever."""
    asked = _options(script)
    for line in _run("scontrol", "show", "partition", "--oneliner").splitlines():
        known = dict(field.partition("=")[::2] for field in line.split())
        name = known.get("PartitionName", "")
        ours = asked.get("partition", name if known.get("Default") == "YES" else "")
        most_s = parse_slurm_duration_s(known.get("MaxTime", ""))
        if name == ours and most_s and int(asked["time"]) * 60 > most_s:
            what = f"Requested time limit is invalid: {ours} allows {most_s / 60:.0f} minutes"
            raise Refused(what, _asked(script))


def _options(script: str) -> dict[str, str]:
    """Options of sbatch that a script has."""
    lines = (line for line in script.splitlines() if line.startswith("#SBATCH --"))
    pairs = (line.removeprefix("#SBATCH --").partition("=") for line in lines)
    return {name: value for name, _, value in pairs}


def _nodes_are_away() -> bool:
    away = "down,drain,fail,maint,unk,no_respond"
    return bool(_run("sinfo", "-h", "-N", "-t", away, "-o", "%N").strip())


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
        Refused: Slurm will never run it, or takes no more jobs now.
        ClusterError: sbatch failed otherwise.
    """
    from submitit import SlurmExecutor
    from submitit.core.utils import DelayedSubmission, FailedJobError, FailedSubmissionError

    executor = SlurmExecutor(folder=folder, python=cluster.python)
    executor.update_parameters(**submitit_kwargs(folder, options, cluster))
    runs_file(folder, options).write_text(json.dumps([str(run) for run in runs]))
    for index, run in enumerate(runs):
        what = DelayedSubmission(entry, str(run))
        what.set_timeout(options["time"], executor.max_num_timeout)
        element = f"_{index}" if len(runs) > 1 else ""
        what.dump(folder / f"{options['comment']}{element}.pkl")
    asked = [name for name, value in options.items() if value is not None]
    try:
        with _without_sbatch_env(asked):
            jobs = (
                [executor.submit(entry, str(runs[0]))]
                if len(runs) == 1
                else executor.map_array(entry, [str(run) for run in runs])
            )
    except (FailedJobError, FailedSubmissionError) as error:
        refusal = parse_refusal(str(error), "the script of the dry run")
        if refusal is not None:
            raise refusal from None
        raise ClusterError(
            f"sbatch failed, and may have queued it or not; hpcft status tells: {error}"
        ) from None
    return [job.job_id for job in jobs]


# Slurm sets them in a job for the GPUs that it got.
_GPUS_OF_A_JOB = ("CUDA_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL", "ROCR_VISIBLE_DEVICES",
                  "ZE_AFFINITY_MASK")  # fmt: skip


@contextlib.contextmanager
def without_job_env() -> Iterator[None]:
    """Lets a job submit another one as a login node would: the other inherits nothing of it."""
    from submitit.helpers import clean_env

    of_the_user = {"SLURM_CONF", *_DEFAULTS.values()} & os.environ.keys()
    kept = {name: os.environ[name] for name in of_the_user}
    with clean_env(_GPUS_OF_A_JOB):
        os.environ.update(kept)
        yield


# ---------------------------------------------------------------- asking


def job_states(job_ids: list[str]) -> dict[str, JobState]:
    """The state of each job: one squeue call, and one sacct call for those that it has forgotten.

    With accounting down squeue still knows recent jobs; what nobody knows is UNKNOWN, with the
    reason, and never «failed». Accounting lags behind: what it says of a job that is queued again,
    or has ended, may be of an earlier start.
    """
    if not job_ids:
        return {}
    trouble: list[str] = []
    found: dict[str, JobState] = {}
    unknown_to_slurm = False
    try:
        found = _squeue(job_ids)
        unknown_to_slurm = True  # whatever the controller does not list, it does not have
    except ClusterError as error:
        trouble.append(str(error))
    missing = [job_id for job_id in job_ids if job_id not in found]
    if missing:
        try:
            accounts = _sacct(missing)
        except ClusterError as error:
            trouble.append(str(error))
            accounts = {}
        for job_id in missing:
            found[job_id] = _by_accounts(accounts.get(job_id), "; ".join(trouble), unknown_to_slurm)
    return {job_id: found[job_id] for job_id in job_ids}


def _by_accounts(state: JobState | None, trouble: str, unknown_to_slurm: bool) -> JobState:
    """What accounting tells of a job that squeue does not list, or was not asked of."""
    if state is None:
        reason = trouble or "neither squeue nor sacct knows the job"
        return JobState(UNKNOWN, reason, unknown_to_slurm=unknown_to_slurm)
    if unknown_to_slurm and state.is_live:
        reason = f"Slurm has forgotten the job, and accounting still has it {state.state}"
        return JobState(UNKNOWN, reason, state.nodes, unknown_to_slurm=True)
    if not unknown_to_slurm and state.state in RESTARTABLE:
        reason = f"{trouble}; accounting has it {state.state}, but it may be queued again"
        return JobState(UNKNOWN, reason, state.nodes)
    return state


def _squeue(job_ids: list[str]) -> dict[str, JobState]:
    # Asked by user: with `-j`, one forgotten id makes squeue fail for all.
    text = _run("squeue", "-h", "-r", "-t", "all", "-u", getpass.getuser(), "-o", SQUEUE_FIELDS)
    return parse_squeue(text, set(job_ids))


def _sacct(job_ids: list[str]) -> dict[str, JobState]:
    whole = sorted({job_id.split("_")[0] for job_id in job_ids})
    text = _run("sacct", "-X", "-P", "-n", "-j", ",".join(whole), "-o", SACCT_FIELDS)
    return parse_sacct(text, set(job_ids))


def ids_by_token() -> dict[tuple[str, int | None], str]:
    """Id of each live or recent job by its comment, of an array's elements with their index."""
    text = _run("squeue", "-h", "-r", "-t", "all", "-u", getpass.getuser(), "-o", "%i|%k")
    found: dict[tuple[str, int | None], str] = {}
    for line in text.splitlines():
        job_id, _, comment = line.partition("|")
        index = job_id.partition("_")[2]
        if index.isdecimal() or not index:
            found[comment.strip(), int(index) if index else None] = job_id
    return found


def find_by_token(token: str, array_index: int | None = None) -> str | None:
    """Id of the live or recent job, or array element, whose comment is `token`; None if none is."""
    return ids_by_token().get((token, array_index))


def current_job_id() -> str:
    """Id of the job that this process belongs to, `123` or `123_4`."""
    array, element = (os.environ.get(f"SLURM_ARRAY_{x}_ID") for x in ("JOB", "TASK"))
    return f"{array}_{element}" if array else os.environ["SLURM_JOB_ID"]


def current_node() -> str:
    """Slurm's name of the node that this process runs on, or the machine's own."""
    return os.environ.get("SLURMD_NODENAME") or os.uname().nodename


def restart_count() -> int:
    """How often Slurm has started the job of this process again; 0 where it runs without Slurm."""
    return int(os.environ.get("SLURM_RESTART_COUNT") or 0)


def time_limit_at(job_id: str) -> float | None:
    """Unix time at which a running job meets its time limit; None where Slurm does not tell.

    Since 23.02 a job's own environment says so.
    """
    known = os.environ.get("SLURM_JOB_END_TIME")
    if known:
        return float(known)
    try:
        return float(_run("squeue", "-h", "-j", job_id, "-o", "%e"))
    except (ClusterError, ValueError):
        return None


def requeue(job_id: str) -> None:
    """Has Slurm end a job, or one element of an array, and start it again."""
    _run("scontrol", "requeue", job_id)


def cancel(job_id: str) -> None:
    """Cancels a job or one element of an array."""
    _run("scancel", job_id)

"""Runs Slurm's commands, and reads the queue and the accounting."""

from __future__ import annotations

import getpass
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence

from hpcft.core.errors import ClusterError
from hpcft.scheduler.job_state import RESTARTABLE, UNKNOWN, JobState
from hpcft.scheduler.slurm_output import (
    ORIGIN_FIELDS,
    SACCT_FIELDS,
    SQUEUE_FIELDS,
    parse_sacct,
    parse_squeue,
)

TIMEOUT_S = 30
"""Timeout of a command: without one, clients wait for an absent slurmctld for minutes."""


def run_command(
    *command: str,
    timeout_s: float | None = None,
    stdin: str | None = None,
    environment: Mapping[str, str] | None = None,
) -> str:
    """Runs a command of Slurm; returns its standard output.

    Args:
        command: the program and its arguments.
        timeout_s: longest time to wait, in seconds; by default `TIMEOUT_S`.
        stdin: text for its standard input.
        environment: its environment; by default that of this process, without variables that make
            squeue and sacct hide jobs.

    Raises:
        ClusterError: the command is missing, failed, or did not answer in time.
    """
    timeout_s = timeout_s or TIMEOUT_S
    try:
        done = subprocess.run(
            command,
            input=stdin,
            capture_output=True,
            timeout=timeout_s,
            check=False,
            encoding="utf-8",  # not the locale's, which may lack letters of a path in a script
            errors="surrogateescape" if stdin else "replace",
            env=_environment() if environment is None else environment,
        )
    except FileNotFoundError:
        raise ClusterError(f"{command[0]} is not on PATH: is this a Slurm login node?") from None
    except subprocess.TimeoutExpired:
        raise ClusterError(f"{command[0]} did not answer within {timeout_s:.0f} s") from None
    if done.returncode:
        output = done.stderr.strip() or done.stdout.strip()
        raise ClusterError(f"{command[0]} failed ({done.returncode}): {output}")
    return done.stdout


def _environment() -> dict[str, str]:
    """Returns this process's environment without variables that make squeue and sacct hide jobs."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SQUEUE_", "SACCT_"))}
    # Times as seconds since 1970; no list of array elements is shortened.
    return kept | {"SLURM_TIME_FORMAT": "%s", "SLURM_BITSTR_LEN": "0"}


# ---------------------------------------------------------------- the cluster


def cluster_name() -> str | None:
    """Returns Slurm's name of this cluster; None if there is no Slurm.

    Raises:
        ClusterError: Slurm is configured, but does not answer.
    """
    if shutil.which("scontrol") is None or shutil.which("sbatch") is None:
        return None
    try:
        return configuration(timeout_s=10).get("ClusterName")
    except ClusterError as error:
        if "resolve" in str(error) or "config" in str(error):
            return None  # The client programs are installed, but no cluster is configured.
        raise


def configuration(timeout_s: float | None = None) -> dict[str, str]:
    """Returns the configuration of the controller, by parameter.

    Raises:
        ClusterError: the controller does not answer.
    """
    text = run_command("scontrol", "show", "config", timeout_s=timeout_s)
    return dict(re.findall(r"^(\w+)\s*= *(\S+)", text, re.MULTILINE))


# ---------------------------------------------------------------- jobs


def job_states(
    job_ids: Sequence[str], origins: Mapping[str, Sequence[str]] | None = None
) -> dict[str, JobState]:
    """Returns the state of each job: one squeue call, one sacct call for those that it lacks.

    With accounting down squeue still lists recent jobs. A job that neither knows is UNKNOWN, with
    the reason, and never FAILED. Accounting lags behind: its state of a job that was requeued, or
    has ended, may be that of an earlier start.

    Args:
        job_ids: ids of the jobs.
        origins: for a job the texts of which its comment or the path of its script holds one. A job
            that holds none is another one, which got the id after the controller had lost its
            state: then the state of the wanted job is UNKNOWN.
    """
    if not job_ids:
        return {}
    trouble: list[str] = []
    states: dict[str, JobState] = {}
    has_squeue = False
    try:
        states = {
            job_id: _own(job_id, state, origins, is_not_queued=True)
            for job_id, state in _squeue(job_ids).items()
        }
        has_squeue = True
    except ClusterError as error:
        trouble.append(str(error))
    missing = [job_id for job_id in job_ids if job_id not in states]
    if missing:
        try:
            accounts = {
                job_id: _own(job_id, state, origins, is_not_queued=has_squeue)
                for job_id, state in _sacct(missing).items()
            }
        except ClusterError as error:
            trouble.append(str(error))
            accounts = {}
        for job_id in missing:
            states[job_id] = _from_accounting(
                accounts.get(job_id), trouble="; ".join(trouble), is_not_queued=has_squeue
            )
    return {job_id: states[job_id] for job_id in job_ids}


def _own(
    job_id: str,
    state: JobState,
    origins: Mapping[str, Sequence[str]] | None,
    *,
    is_not_queued: bool,
) -> JobState:
    """Returns the state of a job; UNKNOWN if it is that of another job with the same id.

    Args:
        job_id: id of the job.
        state: state of the job that has the id.
        origins: as in `job_states`.
        is_not_queued: whether the controller does not have the wanted job, if this is another.
    """
    texts = (origins or {}).get(job_id, ())
    origin = state.origin
    if origin is None or not texts or any(text in origin for text in texts):
        return state
    which = f" ({origin[:200]})" if origin else ""
    reason = f"job {job_id} of this cluster is another one by now{which}"
    return JobState(UNKNOWN, reason, unknown_to_slurm=is_not_queued)


def _from_accounting(state: JobState | None, *, trouble: str, is_not_queued: bool) -> JobState:
    """Returns the state of a job that squeue does not list.

    Args:
        state: state in the accounting; None if it has none.
        trouble: why squeue or sacct failed.
        is_not_queued: whether squeue answered, so that the controller does not have the job.
    """
    if state is None:
        reason = trouble or "neither squeue nor sacct knows the job"
        return JobState(UNKNOWN, reason, unknown_to_slurm=is_not_queued)
    if is_not_queued and state.is_live:
        reason = f"squeue no longer lists the job, and accounting still has it {state.state}"
        return JobState(UNKNOWN, reason, nodes=state.nodes, unknown_to_slurm=True)
    if not is_not_queued and state.state in RESTARTABLE:
        reason = f"{trouble}; accounting has it {state.state}, but it may be queued again"
        return JobState(UNKNOWN, reason, nodes=state.nodes)
    return state


def _squeue(job_ids: Sequence[str]) -> dict[str, JobState]:
    # All jobs of the user: with `-j`, one id that Slurm has forgotten makes squeue fail for all.
    user = getpass.getuser()
    text = run_command("squeue", "-h", "-r", "-t", "all", "-u", user, "-o", SQUEUE_FIELDS)
    return parse_squeue(text, set(job_ids))


def _sacct(job_ids: Sequence[str]) -> dict[str, JobState]:
    array_ids = sorted({job_id.split("_")[0] for job_id in job_ids})
    command = ("sacct", "-X", "-P", "-n", "-j", ",".join(array_ids), "-o")
    try:
        text = run_command(*command, f"{SACCT_FIELDS},{ORIGIN_FIELDS}")
    except ClusterError as error:
        if "nvalid field" not in str(error):
            raise
        text = run_command(*command, SACCT_FIELDS)
    return parse_sacct(text, set(job_ids))


def ids_by_token() -> dict[tuple[str, int | None], str]:
    """Returns the ids of live and recent jobs, by comment and array index (None without one)."""
    user = getpass.getuser()
    text = run_command("squeue", "-h", "-r", "-t", "all", "-u", user, "-o", "%i|%k")
    ids: dict[tuple[str, int | None], str] = {}
    for line in text.splitlines():
        job_id, _, comment = line.partition("|")
        index = job_id.partition("_")[2]
        if index.isdecimal() or not index:
            ids[comment.strip(), int(index) if index else None] = job_id
    return ids


def cancel(*job_ids: str) -> None:
    """Cancels jobs or elements of arrays."""
    run_command("scancel", *job_ids)

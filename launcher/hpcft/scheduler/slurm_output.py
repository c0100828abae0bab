"""Reads what Slurm's commands print: states of jobs, and why a job was refused."""

from __future__ import annotations

import re

from hpcft.core.units import parse_slurm_duration_s
from hpcft.scheduler.job_state import PENDING, JobState, cancelled_by, normalise_state
from hpcft.scheduler.pending_reasons import explain_reason
from hpcft.scheduler.protocol import Refused, TooManyJobs

# Times are seconds since 1970 (SLURM_TIME_FORMAT=%s). The reason is last: it may hold a "|".
SQUEUE_FIELDS = "%i|%T|%M|%N|%e|%r"
SACCT_FIELDS = "JobID,State,ExitCode,Elapsed,NodeList"


# ---------------------------------------------------------------- states


def parse_squeue(text: str, wanted: set[str]) -> dict[str, JobState]:
    """Returns the states of the wanted jobs from lines of `squeue`, in `SQUEUE_FIELDS`."""
    states = {}
    for line in text.splitlines():
        job_id, word, elapsed, nodes, end, reason = [*line.split("|", 5), *[""] * 5][:6]
        if job_id not in wanted:
            continue
        state = normalise_state(word)
        states[job_id] = JobState(
            state,
            explain_reason(reason) if state in PENDING else "",
            nodes=nodes,
            elapsed_s=parse_slurm_duration_s(elapsed),
            # For a job that is not over, this is the time at which its time limit ends it.
            ended_at=float(end) if end.isdecimal() else None,
        )
    return states


def parse_sacct(text: str, wanted: set[str]) -> dict[str, JobState]:
    """Returns the states of the wanted jobs from lines of `sacct -X -P -n`, in `SACCT_FIELDS`."""
    states = {}
    for line in text.splitlines():
        name, word, exit_code, elapsed, nodes = [*line.split("|"), "", "", "", ""][:5]
        for job_id in _elements(name):
            states[job_id] = JobState(
                normalise_state(word),
                cancelled_by(word),
                nodes=nodes,
                elapsed_s=parse_slurm_duration_s(elapsed),
                exit_code=exit_code,
            )
    # An array that was cancelled before any element had started has a line of its own only.
    for job_id in wanted - states.keys():
        if array := states.get(job_id.partition("_")[0]):
            states[job_id] = array
    return {job_id: state for job_id, state in states.items() if job_id in wanted}


def _elements(name: str) -> set[str]:
    """Returns the job ids of a JobID of sacct, which joins pending elements: `12_[3-5,8%2]`."""
    match = re.fullmatch(r"(\d+)_\[([\d,-]+)(?:%\d+)?\]", name)
    if not match:
        return {name}
    spans = [part.partition("-") for part in match[2].split(",")]
    return {
        f"{match[1]}_{index}"
        for first, _, last in spans
        for index in range(int(first), int(last or first) + 1)
    }


# ---------------------------------------------------------------- refusals


# Word in a refusal to the field of the profile that is to blame; the first match wins.
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
# AssocMaxSubmitJobLimit, QOSMaxSubmitJobPerUserLimit, AssocGrpSubmitJobsLimit, …
_SUBMIT_LIMIT = re.compile(r"\w*(?:Max|Grp)SubmitJob\w*")
# A client prints these if the controller is away, busy or starting: no judgement of the job.
_NO_ANSWER = ("contact", "timed out", "temporarily", "try again", "shutting down", "Connection")


def parse_refusal(output: str, requested: str) -> Refused | None:
    """Returns Slurm's refusal of a job; None if a command failed for another reason.

    Args:
        output: everything that the command printed.
        requested: what the job requested, in words.
    """
    if any(word in output for word in _NO_ANSWER):
        return None
    for words in ("allocation failure:", "submission failed:"):
        if words in output:
            if limit := _SUBMIT_LIMIT.search(output):
                return TooManyJobs(limit[0], requested=requested)
            reason = output.split(words)[-1].strip().splitlines()[0]
            key = next((key for word, key in _BLAME if word in reason.lower()), "name")
            return Refused(reason, requested=requested, key=key)
    return None

"""What Slurm's commands print, read: states, tokens, and why a job is refused."""

from __future__ import annotations

import re

from hpcft.core.units import parse_slurm_duration_s
from hpcft.scheduler.job_state import PENDING, JobState, cancelled_by, normalise_state
from hpcft.scheduler.pending_reasons import explain_reason

# With times as seconds since 1970 (SLURM_TIME_FORMAT=%s). A reason may hold any character.
SQUEUE_FIELDS = "%i|%T|%M|%N|%e|%r"
SACCT_FIELDS = "JobID,State,ExitCode,Elapsed,NodeList"


def parse_squeue(text: str, wanted: set[str]) -> dict[str, JobState]:
    """States from lines of `squeue`, in `SQUEUE_FIELDS`."""
    found = {}
    for line in text.splitlines():
        job_id, state, elapsed, nodes, end, reason = [*line.split("|", 5), *[""] * 5][:6]
        if job_id in wanted:
            word = normalise_state(state)
            made = JobState(
                word,
                explain_reason(reason) if word in PENDING else "",
                nodes,
                parse_slurm_duration_s(elapsed),
                # Of a job that is not over it is when its time limit ends it.
                ended_at=float(end) if end.isdecimal() else None,
            )
            found[job_id] = made
    return found


def parse_sacct(text: str, wanted: set[str]) -> dict[str, JobState]:
    """States from lines of `sacct -X -P -n`, in `SACCT_FIELDS`."""
    found = {}
    for line in text.splitlines():
        name, state, exit_code, elapsed, nodes = [*line.split("|"), "", "", "", ""][:5]
        for job_id in _elements(name):
            found[job_id] = JobState(
                normalise_state(state),
                cancelled_by(state),
                nodes,
                parse_slurm_duration_s(elapsed),
                exit_code,
            )
    # An array that was cancelled before any element had started has but its own name.
    for job_id in wanted - found.keys():
        if whole := found.get(job_id.partition("_")[0]):
            found[job_id] = whole
    return {job_id: state for job_id, state in found.items() if job_id in wanted}


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


# ---------------------------------------------------------------- refusals


class Refused(Exception):
    """Slurm would not take a job; `key` is the profile's field that is to blame, if one is."""

    def __init__(self, reason: str, asked: str) -> None:
        super().__init__(reason)
        self.reason = f"{reason}, asked for {asked}"
        self.key = next((key for word, key in _BLAME if word in reason.lower()), "name")
        self.fix = "correct the profile, or the recipe's resources"


class TooManyJobs(Refused):
    """Slurm takes no more jobs of this user for now; `reason` names the limit."""


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
# AssocMaxSubmitJobLimit, QOSMaxSubmitJobPerUserLimit, AssocGrpSubmitJobsLimit, …
_SUBMIT_LIMIT = re.compile(r"\w*(?:Max|Grp)SubmitJob\w*")


def parse_refusal(said: str, asked: str) -> Refused | None:
    """Slurm's refusal of a job, from what a client printed; None where it is another trouble.

    Args:
        said: all that the client printed.
        asked: what was asked for, in words.
    """
    for words in ("allocation failure:", "submission failed:"):
        if words in said and not any(word in said for word in _TROUBLE):
            if limit := _SUBMIT_LIMIT.search(said):
                return TooManyJobs(limit[0], asked)
            return Refused(said.split(words)[-1].strip().splitlines()[0], asked)
    return None


# What a client prints of a controller that is away, busy or starting: no judgement of the job.
_TROUBLE = ("contact", "timed out", "temporarily", "try again", "shutting down", "Connection")

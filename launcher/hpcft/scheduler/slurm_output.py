"""Reads what Slurm's commands print: states of jobs, and why a job was refused."""

from __future__ import annotations

import re
from collections.abc import Collection

from hpcft.core.units import parse_slurm_duration_s
from hpcft.scheduler.job_state import PENDING, JobState, cancelled_by, normalise_state
from hpcft.scheduler.pending_reasons import explain_reason
from hpcft.scheduler.protocol import Refused, TooManyJobs

# Times are seconds since 1970 (SLURM_TIME_FORMAT=%s). The last fields may hold a "|".
SQUEUE_FIELDS = "%i|%T|%M|%N|%e|%k|%o|%r"
SACCT_FIELDS = "JobID,State,ExitCode,Elapsed,NodeList"
ORIGIN_FIELDS = "Comment,SubmitLine"
"""Further fields of sacct; SubmitLine exists since Slurm 21.08."""


# ---------------------------------------------------------------- states


def parse_squeue(text: str, wanted: set[str]) -> dict[str, JobState]:
    """Returns the states of the wanted jobs from lines of `squeue`, in `SQUEUE_FIELDS`."""
    states = {}
    for line in text.splitlines():
        job_id, word, elapsed, nodes, end, comment, command, reason = [
            *line.split("|", 7),
            *[""] * 7,
        ][:8]
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
            origin=_origin(comment, command),
        )
    return states


def parse_sacct(text: str, wanted: set[str]) -> dict[str, JobState]:
    """Returns the states of the wanted jobs from lines of `sacct -X -P -n`.

    Args:
        text: lines in `SACCT_FIELDS`, with or without `ORIGIN_FIELDS` behind them.
        wanted: ids of jobs.
    """
    states = {}
    for line in text.splitlines():
        name, word, exit_code, elapsed, nodes, *origin = [*line.split("|", 6), *[""] * 4]
        for job_id in _elements(name):
            states[job_id] = JobState(
                normalise_state(word),
                cancelled_by(word),
                nodes=nodes,
                elapsed_s=parse_slurm_duration_s(elapsed),
                exit_code=exit_code,
                origin=_origin(*origin) or None,  # Not every site stores them.
            )
    # An array that was cancelled before any element had started has a line of its own only.
    for job_id in wanted - states.keys():
        if array := states.get(job_id.partition("_")[0]):
            states[job_id] = array
    return {job_id: state for job_id, state in states.items() if job_id in wanted}


def _origin(*texts: str) -> str:
    return " ".join(text for text in texts if text not in ("", "(null)"))


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


# Word in Slurm's reason to the fields of the profile that may be to blame, each with the option in
# which it stands in the script (None: it always does); the first match wins.
_Blame = tuple[tuple[str, str | None], ...]
_QOS: _Blame = (("qos", "qos"),)
_ACCOUNT: _Blame = (("account", "account"),)
_GPUS: _Blame = (("gpu_request", "gpus-per-node"), ("gpu_request", "gres"))
_BLAME: tuple[tuple[str, _Blame], ...] = (
    ("accounting/qos policy", _QOS + _ACCOUNT),
    ("account", _ACCOUNT),
    ("partition", (("partition", "partition"),)),
    ("qos", _QOS),
    ("feature", (("constraint", "constraint"),)),
    ("time limit", (("time_limit_min", None),)),
    ("memory", (("host_memory_gib", None),)),
    ("processors", (("cores_per_node", None),)),
    ("cpu count", (("cores_per_node", None),)),
    ("generic resource", _GPUS),
    ("trackable resource", _GPUS),
    (
        "node configuration",
        (("gpus_per_node", "gpus-per-node"), ("gpus_per_node", "gres"), ("cores_per_node", None)),
    ),
    ("node count", (("max_nodes", None),)),
)
# AssocMaxSubmitJobLimit, QOSMaxSubmitJobPerUserLimit, AssocGrpSubmitJobsLimit, …
_SUBMIT_LIMIT = re.compile(r"\w*(?:Max|Grp)SubmitJob\w*")
# A client prints these if the controller is away, busy or starting: no judgement of the job.
_NO_ANSWER = ("contact", "timed out", "temporarily", "try again", "shutting down", "Connection")
_REFUSAL = re.compile(r"(?:allocation failure|submission failed): *(.+)|(cli_filter .+)")


def parse_refusal(output: str, requested: str, options: Collection[str]) -> Refused | None:
    """Returns Slurm's refusal of a job; None if a command failed for another reason.

    Args:
        output: everything that the command printed.
        requested: what the job requested, in words.
        options: options in the script, without dashes: a field that is not set is not to blame.
    """
    found = list(_REFUSAL.finditer(output))
    if not found:
        return None
    reason = str(found[-1][1] or found[-1][2]).strip()
    # A site's own words may ask to contact somebody; only Slurm's say that it did not answer.
    if any(word in reason for word in _NO_ANSWER):
        return None
    if limit := _SUBMIT_LIMIT.search(output):
        return TooManyJobs(limit[0], requested=requested)
    key = _field_to_blame(reason.lower(), options)
    return Refused(
        "; ".join([*_words_before(output, reason), reason]), requested=requested, key=key
    )


def _words_before(output: str, reason: str) -> list[str]:
    """Returns the messages of sbatch and of the site's plugins that lead to Slurm's reason."""
    lines = re.findall(r"^.*?sbatch: (?:error: )?(.+)$", output, re.MULTILINE)
    words = (line.strip() for line in lines if not _REFUSAL.search(line))
    return list(dict.fromkeys(word for word in words if word and word != reason))


def _field_to_blame(reason: str, options: Collection[str]) -> str:
    """Returns the field of the profile that a reason is about; empty if no field is known."""
    fields: _Blame = next((fields for word, fields in _BLAME if word in reason), ())
    return next((key for key, option in fields if option is None or option in options), "")


# ---------------------------------------------------------------- a submission

_SUBMITTED = re.compile(r"^Submitted batch job (\d+)", re.MULTILINE)
# `sbatch --parsable`, which wrappers of a site may add; they print lines of their own, too.
_BARE_ID = re.compile(r"^\s*(\d+)(?:;\S+)?\s*$", re.MULTILINE)


def parse_submitted(output: str) -> str | None:
    """Returns the id of the job that sbatch says it has queued; None if it names none."""
    found = _SUBMITTED.findall(output) or _BARE_ID.findall(output)
    return str(found[-1]) if found else None

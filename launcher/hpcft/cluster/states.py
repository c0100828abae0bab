"""What a scheduler says of a job, in one set of words, and pending reasons in plain sentences."""

from __future__ import annotations

from dataclasses import dataclass

PENDING = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESV_DEL_HOLD"}
ACTIVE = {"RUNNING", "COMPLETING", "STAGE_OUT", "SIGNALING", "SUSPENDED", "STOPPED", "RESIZING"}
FAILED = {
    "FAILED", "TIMEOUT", "OUT_OF_MEMORY", "NODE_FAIL", "BOOT_FAIL", "DEADLINE", "PREEMPTED",
    "CANCELLED", "REVOKED", "SPECIAL_EXIT", "LAUNCH_FAILED", "RECONFIG_FAIL",
}  # fmt: skip
COMPLETED = "COMPLETED"
UNKNOWN = "UNKNOWN"


@dataclass(frozen=True)
class JobState:
    """One reading of a job's state."""

    state: str
    """Slurm's word, without `+` and ` by <uid>`; UNKNOWN when nobody could say."""
    reason: str = ""
    """Why it pends or why the state is unknown."""
    nodes: str = ""
    """Node list."""
    elapsed_s: float | None = None
    """Seconds that it has run."""
    exit_code: str = ""
    """`code:signal` as sacct gives it."""

    @property
    def is_live(self) -> bool:
        """Whether the job is queued or runs."""
        return self.state in PENDING or self.state in ACTIVE

    @property
    def is_over(self) -> bool:
        """Whether it is known to have ended; not the opposite of `is_live`."""
        return self.state == COMPLETED or self.state in FAILED


def normalised(word: str) -> str:
    """`CANCELLED by 0` and `CANCELLED+` as `CANCELLED`."""
    words = word.strip().rstrip("+").split()
    return words[0].rstrip("+").upper() if words else UNKNOWN


_REASONS = {
    "Resources": "waiting for nodes to become free",
    "Priority": "jobs of higher priority are ahead",
    "Dependency": "waiting for another job to end",
    "DependencyNeverSatisfied": "the job it depends on failed: cancel it",
    "BeginTime": "its start time has not come (a requeued job waits a little)",
    "JobHeldUser": "held by you: scontrol release",
    "JobHeldAdmin": "held by an administrator: ask them",
    "PartitionDown": "the partition is down: ask the site or choose another",
    "PartitionInactive": "the partition takes no jobs now",
    "PartitionTimeLimit": "asks for more time than the partition allows: lower resources.time_min",
    "PartitionNodeLimit": "asks for more nodes than the partition allows: lower resources.nodes",
    "PartitionConfig": "the partition cannot give what it asks for",
    "ReqNodeNotAvail": "a node that it needs is down or reserved",
    "Nodes required for job are DOWN": "the nodes that it needs are down, drained or reserved",
    "Reservation": "waiting for its reservation",
    "AssocGrpGRES": "your account's GPU limit is reached: wait for other jobs of the account",
    "AssocGrpCpuLimit": "your account's core limit is reached",
    "AssocGrpMemLimit": "your account's memory limit is reached",
    "AssocGrpBillingMinutes": "your account's budget is used up: ask its owner",
    "AssocMaxJobsLimit": "you have as many jobs running as your account allows",
    "QOSMaxJobsPerUserLimit": "you have as many jobs running as the QOS allows",
    "QOSMaxGRESPerUser": "you have as many GPUs in use as the QOS allows",
    "QOSMaxCpuPerUserLimit": "you have as many cores in use as the QOS allows",
    "QOSGrpGRES": "the QOS's GPU limit is reached",
    "QOSMaxWallDurationPerJobLimit": "more time than the QOS allows: lower resources.time_min",
    "InvalidAccount": "the account is not valid: correct it in the profile",
    "InvalidQOS": "the QOS is not valid: correct it in the profile",
    "BadConstraints": "no node has the features that the profile's constraint names",
    "JobArrayTaskLimit": "waiting for other points of the sweep",
    "launch failed requeued held": "could not start on its node and is held: scontrol release",
    "Licenses": "waiting for a licence",
}  # fmt: skip


def explained(reason: str) -> str:
    """A pending reason in plain words; Slurm's own word when it has no sentence here."""
    word = reason.strip()
    if word.startswith("(") and word.endswith(")"):
        word = word[1:-1]
    if word in ("", "None"):
        return ""
    # Some versions print a sentence's words apart, some joined; a list may follow a comma.
    sentence = _REASONS.get(word.split(",")[0].replace("_", " "))
    return f"{sentence} ({word})" if sentence else word

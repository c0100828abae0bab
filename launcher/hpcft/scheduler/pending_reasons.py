"""Explains in plain words why Slurm keeps a job pending."""

from __future__ import annotations

import re

_REASONS = {
    "Resources": "waiting for nodes to become free",
    "Priority": "jobs of higher priority are ahead",
    "Dependency": "waiting for another job to end",
    "DependencyNeverSatisfied": "the job it depends on failed: cancel it",
    "Prolog": "its nodes are being prepared",
    "BeginTime": "its start time has not come (a requeued job waits a little)",
    "SchedDefer": "Slurm looks for nodes in its next scheduling cycle",
    "JobHeldUser": "held by you: scontrol release",
    "JobHeldAdmin": "held by an administrator: ask them",
    "JobHoldMaxRequeue": "restarted as often as the site allows, and held now: see hpcft logs",
    "job requeued in held state": "requeued and held: scontrol release",
    "launch failed requeued held": "could not start on its node, and is held now: scontrol release",
    "FedJobLock": "waiting for the clusters of the federation to agree",
    "PartitionDown": "the partition is down: ask the site or choose another",
    "PartitionInactive": "the partition takes no jobs now",
    "PartitionTimeLimit": "requests more time than the partition allows: lower resources.time_min",
    "PartitionNodeLimit": "requests more nodes than the partition allows: lower resources.nodes",
    "PartitionConfig": "the partition does not have the resources that it requests",
    "ReqNodeNotAvail": "a node that it needs is down or reserved",
    "Nodes required for job are DOWN": "the nodes that it needs are down, drained or reserved",
    "NodeDown": "a node that it needs is down",
    "FrontEndDown": "no front end of the cluster is up: ask the site",
    "PowerNotAvail": "the site has no power left for it now",
    "PowerReserved": "the power that it needs is reserved",
    "Cleaning": "its nodes are being cleaned up after its last start",
    "BlockMaxError": "the nodes report too many errors: ask the site",
    "BlockFreeAction": "its nodes are being freed",
    "BurstBufferResources": "waiting for room in the burst buffer",
    "BurstBufferStageIn": "its data is being copied to the burst buffer",
    "BurstBufferOperation": "the burst buffer failed: ask the site",
    "Reservation": "waiting for its reservation",
    "ReservationDeleted": "its reservation was deleted: submit it again",
    "DeadLine": "it can no longer end before its deadline: submit it again",
    "SystemFailure": "Slurm, its file system or the network failed: ask the site",
    "JobLaunchFailure": "it could not be started: see hpcft logs, and ask the site",
    "NonZeroExitCode": "it ended with an error",
    "OutOfMemory": "it ran out of memory",
    "InactiveLimit": "it was inactive for too long",
    "TimeLimit": "it reached its time limit",
    "InvalidAccount": "the account is not valid: correct it in the profile",
    "AccountNotAllowed": "the partition does not take your account: correct the profile",
    "AccountingPolicy": "your account or QOS does not allow it: ask the site",
    "AssociationJobLimit": "you have as many jobs as your account allows",
    "AssociationResourceLimit": "your account has reached its resource limit",
    "AssociationTimeLimit": "your account has reached its time limit",
    "InvalidQOS": "the QOS is not valid: correct it in the profile",
    "QOSNotAllowed": "the partition or account does not take the QOS: correct the profile",
    "QOSUsageThreshold": "the QOS's usage threshold is exceeded",
    "QOSJobLimit": "you have as many jobs as the QOS allows",
    "QOSResourceLimit": "the QOS has reached its resource limit",
    "QOSTimeLimit": "the QOS has reached its time limit",
    "MaxMemPerLimit": "requests more memory than the partition allows",
    "BadConstraints": "no node has the features that the profile's constraint names",
    "JobArrayTaskLimit": "waiting for other points of the sweep",
    "Licenses": "waiting for a licence",
}  # fmt: skip

# Limits of accounts and QOS, from `job_reason_string` in Slurm's slurm_protocol_defs.c:
# QOSMaxCpuMinutesPerJobLimit, AssocGrpGRESRunMinutes, MaxNodePerAccount, …
_LIMIT = re.compile(
    r"(?P<who>Assoc|QOS|)(?P<how>Grp|Max|Min)"
    r"(?P<what>Cpu|CPU|Jobs?|SubmitJobs?|Mem|Memory|Node|GRES|Billing|Energy|License|BB|Wall|"
    r"WallDuration|Unknown)"
    r"(?P<minutes>RunMinutes|Minutes|)(Per(?P<each>Job|Node|User|Account)|)(Limit|NotSatisfied|)"
)
_LIMITED = {
    "cpu": "cores", "job": "running jobs", "jobs": "running jobs", "submitjob": "queued jobs",
    "submitjobs": "queued jobs", "mem": "memory", "memory": "memory", "node": "nodes",
    "gres": "GPUs", "billing": "billing units", "energy": "energy", "license": "licences",
    "bb": "burst buffer", "wall": "wall time", "wallduration": "time", "unknown": "a resource",
}  # fmt: skip


def _explain_limit(word: str) -> str | None:
    """Explains a limit of an account or a QOS; returns None if the reason is no such limit."""
    match = _LIMIT.fullmatch(word)
    if match is None:
        return None
    owner = "the QOS" if match["who"] == "QOS" else "your account"
    what = _LIMITED[match["what"].lower()] + (" × minutes" if match["minutes"] else "")
    if match["how"] == "Min":
        return f"requests less than {owner} demands ({what}): request more, or correct the profile"
    if match["each"] in ("Job", "Node"):
        each = match["each"].lower()
        return f"requests more {what} per {each} than {owner} allows: lower the recipe's resources"
    if match["minutes"] == "Minutes":
        return f"the budget of {owner} is used up ({what}): ask whoever grants it"
    if match["minutes"]:
        return f"running jobs hold all that {owner} allows at a time ({what})"
    if match["each"] == "User" or (match["how"] == "Max" and not match["each"]):
        return f"you have as many {what} as {owner} allows: wait for your other jobs"
    return f"the limit of {owner} is reached ({what}): wait for other jobs"


def explain_reason(reason: str) -> str:
    """Returns a pending reason in plain words; Slurm's own word if there is no sentence for it."""
    word = reason.strip()
    if word.startswith("(") and word.endswith(")"):
        word = word[1:-1]
    if word in ("", "None"):
        return ""
    # Some versions of Slurm join the words with underscores; a list of nodes may follow.
    name = re.split(r"[,(]", word)[0].replace("_", " ").strip()
    sentence = _REASONS.get(name) or _explain_limit(name)
    return f"{sentence} ({word})" if sentence else word

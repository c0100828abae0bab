"""From what the scheduler says of a job to a failure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from hpcft.core.errors import StoreError
from hpcft.core.files import read_record_if_exists
from hpcft.core.paths import RunPaths
from hpcft.core.records import Cluster, Progress, Recovery
from hpcft.recovery.diagnosis.classes import BY_STATE, KNOWN
from hpcft.recovery.diagnosis.evidence import EvidenceText
from hpcft.recovery.diagnosis.failure import Failure, from_class
from hpcft.scheduler.job_state import JobState

_PHASES = {"starting": "starting", "data": "preparing data", "model": "loading the model"}


def held_reason(state: JobState) -> Failure | None:
    """Why a job that is queued will not start by itself; None where it may."""
    row = BY_STATE.get(state.state)
    if (row and row.name == "requeue_held") or "requeued held" in state.reason:
        return from_class("requeue_held", state.reason or KNOWN["requeue_held"].means)
    return None


def with_node(failure: Failure, state: JobState) -> Failure:
    """With the node of a job that has one only."""
    single = state.nodes and not re.search(r"[\[,\s]", state.nodes)
    return replace(failure, node=state.nodes) if single and not failure.node else failure


def from_setup(text: EvidenceText, paths: RunPaths, state: JobState) -> Failure:
    """A line of the profile's setup failed: what it said, else which lines there are."""
    words = [line for line in text.text.splitlines() if line.strip()]
    if words:
        line = f"the profile's setup failed: {words[-1].strip()}"
    else:
        try:
            cluster = read_record_if_exists(paths.cluster, Cluster)
        except StoreError:
            cluster = None
        lines = "; ".join(cluster.setup) if cluster else ""
        line = f"the profile's setup failed without a word{describe_exit(state)}: {lines}"
    return replace(from_class("module", line), source=text.source)


def from_state(state: JobState, paths: RunPaths, taken: Sequence[Recovery]) -> Failure:
    """What Slurm's word for the end of a job tells."""
    row = BY_STATE[state.state]
    made = with_node(from_class(row.name, row.means), state)
    if row.name == "timeout":
        return from_time_limit(made, paths, taken)
    words = {
        "BOOT_FAIL": "a node did not boot",
        "OUT_OF_MEMORY": "Slurm ended it for using more host memory than --mem",
        "CANCELLED": f"it was cancelled{f' {state.reason}' if state.reason else ''}",
    }
    return replace(made, evidence=words.get(state.state, made.evidence))


def from_time_limit(failure: Failure, paths: RunPaths, taken: Sequence[Recovery]) -> Failure:
    """Of a time limit: whether the run came any further before it."""
    try:
        progress = read_record_if_exists(paths.progress, Progress)
    except StoreError:
        progress = None
    begun = taken[-1].step if taken else 0
    if progress is None:
        return failure
    if progress.step > begun:
        at = f"at step {progress.step:,} of {progress.total_steps:,}"
        return replace(failure, evidence=f"{failure.evidence} {at}")
    doing = _PHASES.get(progress.phase, progress.phase)
    return replace(
        from_class("stuck", f"the time limit was reached before step {begun + 1:,} ({doing})"),
        node=failure.node,
        policy="stop",
        next_step="raise resources.time_min, or see hpcft logs for what takes so long",
    )


def describe_exit(state: JobState) -> str:
    """The exit code, where it is known."""
    return f" (exit code {state.exit_code})" if state.exit_code else ""

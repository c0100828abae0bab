"""Turns the scheduler's state of a job into a failure."""

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

# Phases of `Progress` in words, for a run that made no step.
_PHASES = {"starting": "starting", "data": "preparing data", "model": "loading the model"}


def held_reason(state: JobState) -> Failure | None:
    """Returns why a queued job will not start by itself; None if it may start."""
    row = BY_STATE.get(state.state)
    if (row and row.name == "requeue_held") or "requeued held" in state.reason:
        return from_class("requeue_held", state.reason or KNOWN["requeue_held"].means)
    return None


def with_node(failure: Failure, state: JobState) -> Failure:
    """Returns the failure with the node of its job, if the job has only one."""
    has_one_node = state.nodes and not re.search(r"[\[,\s]", state.nodes)
    return replace(failure, node=state.nodes) if has_one_node and not failure.node else failure


def from_setup(text: EvidenceText, paths: RunPaths, state: JobState) -> Failure:
    """Returns the failure of the profile's setup: its last message, or the setup lines."""
    lines = [line for line in text.text.splitlines() if line.strip()]
    if lines:
        line = f"the profile's setup failed: {lines[-1].strip()}"
    else:
        try:
            cluster = read_record_if_exists(paths.cluster, Cluster)
        except StoreError:
            cluster = None
        setup = "; ".join(cluster.setup) if cluster else ""
        line = f"the profile's setup failed without an error message{describe_exit(state)}: {setup}"
    return replace(from_class("module", line), source=text.source)


def from_state(state: JobState, paths: RunPaths, recoveries: Sequence[Recovery]) -> Failure:
    """Returns the failure that the final state of a job stands for."""
    row = BY_STATE[state.state]
    failure = with_node(from_class(row.name, row.means), state)
    if row.name == "timeout":
        return from_time_limit(failure, paths, recoveries)
    evidence = {
        "BOOT_FAIL": "a node did not boot",
        "OUT_OF_MEMORY": "Slurm ended the job because it used more host memory than --mem",
        "CANCELLED": f"the job was cancelled{f' {state.reason}' if state.reason else ''}",
    }
    return replace(failure, evidence=evidence.get(state.state, failure.evidence))


def from_time_limit(failure: Failure, paths: RunPaths, recoveries: Sequence[Recovery]) -> Failure:
    """Adds the progress to a time limit's failure; without progress it becomes `stuck`."""
    try:
        progress = read_record_if_exists(paths.progress, Progress)
    except StoreError:
        progress = None
    if progress is None:
        return failure
    start_step = recoveries[-1].step if recoveries else 0
    if progress.step > start_step:
        at = f"at step {progress.step:,} of {progress.total_steps:,}"
        return replace(failure, evidence=f"{failure.evidence} {at}")
    phase = _PHASES.get(progress.phase, progress.phase)
    return replace(
        from_class("stuck", f"the time limit was reached before step {start_step + 1:,} ({phase})"),
        node=failure.node,
        policy="stop",
        next_step="raise resources.time_min, or see in hpcft logs RUN what takes so long",
    )


def describe_exit(state: JobState) -> str:
    """Returns the exit code in words; empty if it is not known."""
    return f" (exit code {state.exit_code})" if state.exit_code else ""

"""RunStatus: everything known about a run at one moment, and how its records are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hpcft.core.errors import StoreError
from hpcft.core.files import R, read_record_if_exists
from hpcft.core.paths import RunPaths
from hpcft.core.records import Attempt, Job, Plan, Progress, Recovery, RunRecord
from hpcft.recovery.diagnosis import Failure
from hpcft.recovery.log import fallbacks
from hpcft.scheduler.job_state import UNKNOWN


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """Everything known about a run at one moment."""

    paths: RunPaths
    """Files of the run folder."""
    job: Job
    """The job record; if it cannot be read, a placeholder that holds only the folders' names."""
    state: str
    """PENDING, RUNNING, COMPLETED, FAILED, CANCELLED, TIMEOUT …; UNKNOWN if it is not known."""
    note: str = ""
    """Why the run is pending, failed or unknown, and which of its files are damaged."""
    job_id: str = ""
    """Id of the latest job; empty if the run has none."""
    nodes: str = ""
    """Nodes of the latest job."""
    elapsed_s: float | None = None
    """Seconds that the run took, or that its latest job has run so far."""
    progress: Progress | None = None
    """The latest heartbeat."""
    record: RunRecord | None = None
    """The result; None before the run has completed."""
    plan: Plan | None = None
    """The plan that runs now."""
    recoveries: tuple[Recovery, ...] = ()
    """Recoveries so far, the first one first."""
    failure: Failure | None = None
    """Why the run failed, or is held; None if it did not, or if the cause is not known."""
    damage: str = ""
    """Why job.json or result.json cannot be read; empty if both can."""
    job_ended: bool = False
    """Whether the latest job is known to have ended, with success or not."""

    @property
    def attempt(self) -> Attempt:
        """The latest attempt, with its job id even if job.json lacks it."""
        return self.job.attempts[-1].model_copy(update={"job_id": self.job_id or None})

    @property
    def fallbacks(self) -> list[Recovery]:
        """Recoveries that changed the layout because memory ran out."""
        return fallbacks(self.recoveries)

    @property
    def is_live(self) -> bool:
        """Whether the run is queued or runs."""
        return self.state in ("PENDING", "RUNNING")

    @property
    def is_completed(self) -> bool:
        """Whether the run has a result."""
        return self.record is not None

    @property
    def may_be_live(self) -> bool:
        """Whether the run is queued or runs, as far as it is known."""
        return self.is_live or (self.state == UNKNOWN and not self.job_ended)


def read_or_note(file: Path, kind: type[R], damage: list[str]) -> R | None:
    """Reads a record; if it cannot be read, appends the reason to `damage` and returns None."""
    try:
        return read_record_if_exists(file, kind)
    except StoreError as error:
        damage.append(str(error))
        return None


def read_current_plan(
    paths: RunPaths, recoveries: Sequence[Recovery], notes: list[str]
) -> Plan | None:
    """Reads the plan that runs now, without predictions that are of another layout."""
    before = len(notes)
    plan = read_or_note(paths.current_plan, Plan, notes)
    if plan is None and len(notes) == before:
        plan = read_or_note(paths.plan, Plan, notes)
    changes = fallbacks(recoveries)
    if plan is None or not changes or plan.recovery_number >= changes[-1].number:
        return plan
    # hpcft 0.1 wrote no current_plan.json, so this is the plan from before the fallback.
    layout = {"layout": changes[-1].layout, "recovery_number": changes[-1].number}
    return plan.model_copy(update={**layout, "gpu_memory": [], "host_memory": [], "time": None})

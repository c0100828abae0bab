"""Run: one run's folder as its ranks and its batch script see it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from hpcft.config.recipe_types import FullRecipe
from hpcft.core.files import check_private, read_record, read_record_if_exists
from hpcft.core.paths import RunPaths
from hpcft.core.records import Cluster, Job, Plan, Recovery
from hpcft.planning import oom_fallback
from hpcft.recovery.log import has_recovery, read_recoveries, saved_step, write_current_plan
from hpcft.staging.staged_inputs import load_run_recipe


@dataclass(frozen=True)
class Run:
    """A run folder, opened once: holds what never changes, and reads the rest on request."""

    paths: RunPaths
    """Paths of the run's files."""
    recipe: FullRecipe
    """The recipe, with the folders of staged inputs in the place of hub names."""
    cluster: Cluster
    """The profile that the run was submitted with."""

    @classmethod
    def open(cls, folder: Path) -> Run:
        """Opens a run folder.

        Raises:
            StoreError: others may write to it, or its recipe or profile cannot be read.
        """
        check_private(folder)
        paths = RunPaths(folder)
        return cls(paths, load_run_recipe(paths), read_record(paths.cluster, Cluster))

    def read_job(self) -> Job:
        """Reads the job record: every attempt at the run, the latest last."""
        return read_record(self.paths.job, Job)

    def read_recoveries(self) -> list[Recovery]:
        """Reads the run's recoveries, the first one first.

        Raises:
            StoreError: one cannot be read.
        """
        return read_recoveries(self.paths)

    def has_recovery(self, number: int) -> bool:
        """Returns whether any rank has written the recovery of that number."""
        return has_recovery(self.paths, number)

    def has_result(self) -> bool:
        """Returns whether the run is complete; lists the folder, so that NFS asks its server."""
        return self.paths.result.name in os.listdir(self.paths.folder)

    def saved_step(self) -> int:
        """Returns the optimizer step, or the example, that a restart would resume from."""
        return saved_step(self.paths)

    def read_plan(self) -> Plan:
        """Reads the plan that runs now.

        Raises:
            StoreError: it, or a recovery, cannot be read.
        """
        paths = self.paths
        # hpcft 0.1 wrote no current_plan.json: its plan.json and the last recovery say the same.
        plan = read_record_if_exists(paths.current_plan, Plan) or read_record(paths.plan, Plan)
        recoveries = self.read_recoveries()
        if not recoveries or plan.recovery_number >= recoveries[-1].number:
            return plan
        # The rank that wrote the recovery has not yet written the plan, or died in between.
        return self._with_layout_of(recoveries[-1], plan)

    def read_planned_bytes(self) -> int | None:
        """Returns the memory per rank that the submitted plan predicts; a fallback takes less."""
        return read_record(self.paths.plan, Plan).gpu_peak_bytes

    def remove_last_recovery(self) -> Plan:
        """Removes the last recovery, which could not be carried out; returns the plan before it."""
        *earlier, last = self.read_recoveries()
        plan = read_record(self.paths.plan, Plan)
        before = self._with_layout_of(earlier[-1], plan) if earlier else plan
        # The plan is written first: as long as the recovery exists, `read_plan` follows it.
        write_current_plan(self.paths, before, earlier[-1].number if earlier else 0)
        (self.paths.recoveries / f"{last.number}.json").unlink()
        return before

    def _with_layout_of(self, recovery: Recovery, plan: Plan) -> Plan:
        return oom_fallback.with_layout(
            plan,
            recovery.layout,
            recovery.per_device_eval_batch_size,
            recipe=self.recipe,
            cluster=self.cluster,
        )

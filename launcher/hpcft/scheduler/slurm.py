"""Submits jobs to Slurm with a script that submitit writes, and asks for their states."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cached_property

from hpcft.core.errors import ClusterError
from hpcft.core.files import write_text
from hpcft.core.records import Attempt
from hpcft.core.units import parse_slurm_duration_s
from hpcft.scheduler import slurm_commands
from hpcft.scheduler.job_environment import DEFAULT_VARIABLES, submission_environment
from hpcft.scheduler.job_state import NOT_QUEUED, UNKNOWN, JobState
from hpcft.scheduler.protocol import JobRequest, Refused, Submission
from hpcft.scheduler.sbatch import runs_file, runs_text, sbatch_script
from hpcft.scheduler.slurm_output import parse_refusal, parse_submitted

SUBMIT_TIMEOUT_S = 120.0
"""Timeout of sbatch, which asks a busy controller again and again."""
_MAY_BE_QUEUED = (
    "sbatch failed, and may have queued the job or not (hpcft status shows whether it did)"
)


class Slurm:
    """Slurm as a scheduler: implements `hpcft.scheduler.protocol.Scheduler`."""

    def max_array_size(self) -> int | None:
        """Returns the most elements of a job array; None if Slurm does not say."""
        size = self._configuration.get("MaxArraySize", "")
        return max(int(size), 1) if size.isdecimal() else None  # 0 switches arrays off.

    def cluster_name(self) -> str | None:
        """Returns Slurm's name of this cluster; None if Slurm does not say."""
        return os.environ.get("SLURM_CLUSTER_NAME") or self._configuration.get("ClusterName")

    @cached_property
    def _configuration(self) -> dict[str, str]:
        try:
            return slurm_commands.configuration()
        except ClusterError:
            return {}

    def script(self, request: JobRequest) -> str:
        """Returns the sbatch script of a request."""
        return sbatch_script(request)

    def check(self, request: JobRequest) -> None:
        """Asks Slurm whether it would take the job; see `check_script`."""
        check_script(sbatch_script(request))

    def submit(self, request: JobRequest) -> list[Submission]:
        """Submits one job, or one array for several runs.

        Raises:
            Refused: Slurm refuses the job.
            TooManyJobs: Slurm takes no more jobs now.
            ClusterError: sbatch failed otherwise, and may have queued the job or not.
        """
        write_text(runs_file(request), runs_text(request))
        script = sbatch_script(request)
        file = request.logs / f"{request.token}_submission.sh"
        write_text(file, script)
        try:
            output = slurm_commands.run_command(
                "sbatch",
                str(file),
                timeout_s=SUBMIT_TIMEOUT_S,
                environment=submission_environment(_options(script)),
            )
        except ClusterError as error:
            refusal = _refusal(error, script, "what the script of the dry run shows")
            if refusal is not None:
                raise refusal from None
            raise ClusterError(f"{_MAY_BE_QUEUED}: {error}") from None
        job_id = parse_submitted(output)
        if job_id is None:
            raise ClusterError(f"{_MAY_BE_QUEUED}: it names no job: {output.strip()}")
        if len(request.runs) == 1:
            return [Submission(job_id)]
        return [Submission(f"{job_id}_{index}") for index in range(len(request.runs))]

    def find_jobs(self, attempts: Sequence[Attempt]) -> list[str | None]:
        """Finds the jobs of attempts by their tokens, with one squeue call."""
        if not attempts:
            return []
        ids = slurm_commands.ids_by_token()
        return [ids.get((attempt.token, attempt.array_index)) for attempt in attempts]

    def states(self, attempts: Sequence[Attempt]) -> list[JobState]:
        """Returns the state of each attempt, with one squeue and at most one sacct call."""
        # A script of hpcft has the token in its name; those of 0.1 lay in the folder of the logs.
        origins = {a.job_id: (a.token, f"{a.logs}/") for a in attempts if a.job_id}
        states = slurm_commands.job_states(sorted(origins), origins)
        return [
            self._of_its_cluster(attempt, states[attempt.job_id] if attempt.job_id else NOT_QUEUED)
            for attempt in attempts
        ]

    def _of_its_cluster(self, attempt: Attempt, state: JobState) -> JobState:
        """Returns the state of an attempt; UNKNOWN if its job was submitted to another cluster."""
        cluster = attempt.slurm_cluster
        # A live job has the token of the attempt, so that nothing more needs to be asked.
        if cluster is None or state.is_live or self.cluster_name() in (None, cluster):
            return state
        return JobState(UNKNOWN, f"was submitted to the cluster {cluster}: look there")

    def cancel(self, attempts: Sequence[Attempt]) -> list[bool | ClusterError]:
        """Cancels the live jobs of attempts, and no other job that has got the id of one since."""
        states = self.states(attempts)
        live = [a.job_id for a, state in zip(attempts, states, strict=True) if state.is_live]
        if live:
            # It succeeds too if a job has ended since.
            slurm_commands.cancel(*(str(job_id) for job_id in live))
        return [
            state.is_live
            if state.is_live or state.is_over or state.unknown_to_slurm
            else ClusterError(f"job {attempt.job_id} was not cancelled: {state.reason}")
            for attempt, state in zip(attempts, states, strict=True)
        ]


# ---------------------------------------------------------------- checking before submitting


def check_script(script: str) -> None:
    """Asks Slurm whether it would take a script (`sbatch --test-only`); queues nothing.

    Raises:
        Refused: Slurm would never take it (partition, account, time, more than a node has).
        TooManyJobs: Slurm would take it, but not now.
        ClusterError: Slurm does not answer.
    """
    try:
        slurm_commands.run_command(
            "sbatch",
            "--test-only",
            stdin=script,
            environment=submission_environment(_options(script)),
        )
    except ClusterError as error:
        refusal = _refusal(error, script, _resource_options(script))
        if refusal is None:
            raise
        # With some nodes down, sbatch --test-only refuses jobs that those nodes could run. Then
        # sbatch itself decides, which refuses only jobs that can never run.
        if not ("Requested node config" in str(refusal) and _has_absent_nodes()):
            raise refusal from None
    _check_time(script)


def _refusal(error: ClusterError, script: str, requested: str) -> Refused | None:
    """Returns the refusal of a script that sbatch printed; None if it failed otherwise.

    Args:
        error: the failure of sbatch.
        script: the script.
        requested: what the job requested, in words.
    """
    options = _options(script)
    defaults = [
        f"the variable {variable}={os.environ[variable]}"
        for name, variable in DEFAULT_VARIABLES.items()
        if name not in options and variable in os.environ
    ]
    return parse_refusal(str(error), " and ".join([requested, *defaults]), options)


def _check_time(script: str) -> None:
    """Refuses a time above the partition's limit: by default Slurm lets such a job wait for ever.

    Raises:
        Refused: the partition allows less time.
    """
    options = _options(script)
    partitions = slurm_commands.run_command("scontrol", "show", "partition", "--oneliner")
    for line in partitions.splitlines():
        fields = dict(field.partition("=")[::2] for field in line.split())
        name = fields.get("PartitionName", "")
        wanted = options.get("partition", name if fields.get("Default") == "YES" else "")
        limit_s = parse_slurm_duration_s(fields.get("MaxTime", ""))
        if name == wanted and limit_s and int(options["time"]) * 60 > limit_s:
            reason = f"Requested time limit is invalid: {name} allows {limit_s / 60:.0f} minutes"
            raise Refused(reason, requested=_resource_options(script), key="time_limit_min")


def _options(script: str) -> dict[str, str]:
    """Returns the options of sbatch in a script."""
    lines = (line for line in script.splitlines() if line.startswith("#SBATCH --"))
    pairs = (line.removeprefix("#SBATCH --").partition("=") for line in lines)
    return {name: value for name, _, value in pairs}


def _has_absent_nodes() -> bool:
    states = "down,drain,fail,maint,unk,no_respond"
    return bool(slurm_commands.run_command("sinfo", "-h", "-N", "-t", states, "-o", "%N").strip())


def _resource_options(script: str) -> str:
    """Returns the options that say what a job needs, as they stand in the script."""
    lines = [line.removeprefix("#SBATCH ") for line in script.splitlines()]
    shown = ("--partition", "--account", "--qos", "--constraint", "--nodes", "--ntasks-per-node",
             "--gpus-per-node", "--gres", "--mem", "--time", "--cpus-per-task")  # fmt: skip
    return " ".join(line for line in lines if line.startswith(shown))

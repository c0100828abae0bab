"""How often commands call Slurm: a few times, however many runs they are about."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from builders import RECIPE, SITE, Cli, write_checkpoint
from hpcft.cli import watch
from hpcft.core import run_index
from hpcft.core.errors import ClusterError
from hpcft.core.paths import RunPaths
from hpcft.core.records import Job
from hpcft.jobs.status import RunStatus
from hpcft.scheduler import slurm_commands
from hpcft.scheduler.slurm_output import SQUEUE_FIELDS

SIZE = 30
SWEEP = f"sweep:\n  grid:\n    train.seed: [{', '.join(map(str, range(SIZE)))}]\n"


@dataclass
class FakeSlurm:
    """Slurm's commands, which remember the arrays that are queued and count their calls."""

    state: str = "PENDING"
    """State of all jobs."""
    is_listed: bool = True
    """Whether squeue still lists the jobs."""
    jobs: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Comment and command of each job, by id."""
    calls: list[str] = field(default_factory=list)
    """Commands that were called since the last look at them."""

    def run_command(self, *command: str, stdin: str | None = None, **_: object) -> str:
        """Answers a command of Slurm."""
        self.calls.append(command[0] + " --test-only" * ("--test-only" in command))
        if command[0] == "scontrol":
            return "ClusterName = fake\nMaxArraySize = 1001\n" if "config" in command else ""
        if command[0] == "squeue":
            lines = "".join(self._line(command, job_id) + "\n" for job_id in self.jobs)
            return lines if self.is_listed else ""
        if command[0] == "sacct":
            return "".join(f"{job_id}|{self.state}|0:0|00:00:00|n1\n" for job_id in self.jobs)
        if command[0] == "sbatch" and "--test-only" not in command:
            return f"Submitted batch job {self._queue(Path(command[-1]).read_text(), command[-1])}"
        if command[0] == "scancel":
            self.state = "CANCELLED"
            return ""
        if command[0] == "sbatch":
            return ""
        raise ClusterError(f"{command[0]}: command not found")

    def _line(self, command: tuple[str, ...], job_id: str) -> str:
        comment, script = self.jobs[job_id]
        values = {"%i": job_id, "%T": self.state, "%k": comment, "%o": script, "%M": "0:00",
                  "%N": "", "%e": "N/A", "%r": "Priority"}  # fmt: skip
        return re.sub("%.", lambda mark: values[mark[0]], command[-1])

    def _queue(self, script: str, file: str) -> str:
        number = str(100 + len(self.jobs))
        comment = re.search(r"--comment=(\S+)", script)
        last = re.search(r"--array=0-(\d+)", script)
        assert comment
        ids = [f"{number}_{index}" for index in range(int(last[1]) + 1)] if last else [number]
        self.jobs |= {job_id: (comment[1], file) for job_id in ids}
        return number

    def counted(self) -> list[str]:
        """Returns the commands since the last look."""
        calls, self.calls = self.calls, []
        return calls


@pytest.fixture
def slurm(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    """A Slurm on which a sweep is pending."""
    fake = FakeSlurm()
    monkeypatch.setattr(slurm_commands, "run_command", fake.run_command)
    Path("site.yaml").write_text(SITE)
    Path("sweep.yaml").write_text(RECIPE + SWEEP)
    assert "%i" in SQUEUE_FIELDS
    return fake


def folders() -> list[RunPaths]:
    return [run.paths for run in run_index.list_runs(Path("runs"))]


def test_submit_again_of_a_pending_sweep_is_one_squeue(slurm: FakeSlurm, cli: Cli) -> None:
    said = cli("submit", "sweep.yaml", "-c", "./site.yaml")
    assert said.code == 0, said.err
    assert len(said.err.splitlines()) < 20
    assert f"{SIZE} runs in all: {SIZE} submitted (job" in said.err
    assert len(slurm.jobs) == SIZE
    assert len(slurm.counted()) <= 4
    said = cli("submit", "sweep.yaml", "-c", "./site.yaml")
    assert f"{SIZE} queued or running already" in said.err
    assert slurm.counted().count("squeue") == 1
    assert len(slurm.jobs) == SIZE


@pytest.mark.parametrize("is_listed", [True, False])
def test_submit_again_of_cancelled_points_is_one_look_at_all(
    is_listed: bool, slurm: FakeSlurm, cli: Cli
) -> None:
    assert cli("submit", "sweep.yaml", "-c", "./site.yaml").code == 0
    slurm.counted()
    slurm.state, slurm.is_listed = "CANCELLED", is_listed
    said = cli("submit", "sweep.yaml", "-c", "./site.yaml")
    assert said.code == 0, said.err
    assert len(slurm.jobs) == 2 * SIZE
    calls = slurm.counted()
    assert calls.count("squeue") + calls.count("sacct") == 1 + (not is_listed)
    assert calls.count("sbatch") == 1
    assert len(calls) <= 6


def test_resume_of_many_runs_is_one_array(slurm: FakeSlurm, cli: Cli) -> None:
    assert cli("submit", "sweep.yaml", "-c", "./site.yaml").code == 0
    slurm.state, slurm.is_listed = "TIMEOUT", False
    first = set(slurm.jobs)
    write_checkpoint(folders()[3], 2)
    slurm.counted()
    said = cli("resume", "tiny")
    assert said.code == 0, said.err
    assert said.err.count("resumes from the beginning as job") == SIZE - 1
    assert said.err.count("resumes from step 2 as job") == 1
    calls = slurm.counted()
    assert calls.count("sbatch") == 1
    assert len(calls) <= 6, calls
    new = set(slurm.jobs) - first
    assert len(new) == SIZE
    assert len({job_id.partition("_")[0] for job_id in new}) == 1
    recorded = [run.job.attempts[-1].job_id for run in run_index.list_runs(Path("runs"))]
    assert set(recorded) == new


def test_resume_asks_again_if_a_run_has_a_new_attempt(slurm: FakeSlurm, cli: Cli) -> None:
    """Between a look at the runs and the lock, another command may have submitted one of them."""
    from hpcft.jobs.earlier_run import find_earlier_runs
    from hpcft.jobs.prepare import prepare_runs
    from hpcft.jobs.status import run_statuses

    assert cli("submit", "sweep.yaml", "-c", "./site.yaml").code == 0
    slurm.state = "CANCELLED"
    known = {s.paths.folder.absolute(): s for s in run_statuses(run_index.list_runs(Path("runs")))}
    _, prepared = prepare_runs("sweep.yaml", cluster_name="./site.yaml", overrides=[])
    root = Path("runs")
    slurm.counted()
    assert find_earlier_runs(prepared, root, again=False, known=known) == [None] * SIZE
    assert slurm.counted() == []
    slurm.state = "PENDING"
    paths = folders()[0]
    job = Job.model_validate_json(paths.job.read_text())
    later = job.attempts[0].model_copy(update={"token": "another", "job_id": "100_0"})
    slurm.jobs["100_0"] = ("another", slurm.jobs["100_0"][1])
    from hpcft.core.files import write_record

    write_record(paths.job, job.model_copy(update={"attempts": [*job.attempts, later]}))
    found = find_earlier_runs(prepared, root, again=False, known=known)
    assert [run is not None for run in found].count(True) == 1
    assert slurm.counted().count("squeue") == 1


def test_dry_run_of_a_sweep_fits_a_screen(slurm: FakeSlurm, cli: Cli) -> None:
    said = cli("submit", "sweep.yaml", "-c", "./site.yaml", "--dry-run")
    assert said.code == 0, said.err
    assert len(said.out.splitlines()) < 60
    assert f"{SIZE} runs in 1 job" in said.out
    assert f"#SBATCH --array=0-{SIZE - 1}" in said.out
    assert "train.seed: 0, 1, 2" in said.out
    everything = cli("submit", "sweep.yaml", "-c", "./site.yaml", "--dry-run", "--json").json
    assert len(everything["runs"]) == SIZE
    script = everything["jobs"][0]["sbatch_script"]
    assert script in said.out


# ---------------------------------------------------------------- watching


def live_runs(count: int, scheduler: str, runs_folder: Path) -> list[RunStatus]:
    """Statuses of runs that are queued."""
    job = Job.model_construct(run_id="aaaa0000", recipe="made", scheduler=scheduler)
    paths = RunPaths(runs_folder / "made" / "aaaa0000")
    return [RunStatus(paths=paths, job=job, state="PENDING") for _ in range(count)]


@pytest.mark.parametrize(
    ("count", "scheduler", "seconds"),
    [(1, "slurm", 5.0), (10, "slurm", 10.0), (400, "slurm", 20.0), (10_000, "slurm", 60.0),
     (10, "local", 2.0), (0, "slurm", 5.0)],
)  # fmt: skip
def test_watch_interval_grows_with_the_number_of_runs(
    count: int, scheduler: str, seconds: float, tmp_path: Path
) -> None:
    assert watch.interval_s(live_runs(count, scheduler, tmp_path)) == seconds


def test_watch_asks_slurm_once_an_interval(
    slurm: FakeSlurm, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 3:
            slurm.state = "CANCELLED"

    assert cli("submit", "sweep.yaml", "-c", "./site.yaml").code == 0
    slurm.counted()
    monkeypatch.setattr(watch.time, "sleep", sleep)
    assert cli("status", "tiny", "--watch").code != 0
    assert slept == [10.0] * 3
    assert slurm.counted().count("squeue") == 5  # one before it watches, and four looks

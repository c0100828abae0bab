"""Tests of submissions that are killed, doubled or refused: each run has one job in the end."""

from __future__ import annotations

import json
import os
import pickle
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from on_slurm import (
    campus,
    closed,
    hpcft,
    impatient,
    job_ids,
    jobs,
    killed_at,
    live_jobs,
    nothing_left,
    out_of,
    slurm,
    small_disk,
    submit,
)

from builders import ROOT, Cli
from hpcft.core.errors import ClusterError
from hpcft.core.units import parse_slurm_duration_s
from hpcft.jobs import prepare
from hpcft.jobs.submit import submit_runs
from hpcft.scheduler import slurm as slurm_scheduler
from real_runs import folder_of, until

pytestmark = pytest.mark.slurm

SWEEP = ("-o", "sweep.seeds=[1, 2, 3, 4, 5]")


@pytest.fixture(scope="module")
def place(testbed: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A user's folder for all tests of this module."""
    with campus(tmp_path_factory.mktemp("submitting")) as folder:
        yield folder
        subprocess.run(["scancel", "--user=root", "--quiet"], check=False)


@pytest.fixture
def waiting(place: Path, testbed: Any) -> Iterator[Path]:
    """The user's folder, while no job starts."""
    with closed(testbed):
        yield place


def states(cli: Cli, name: str) -> list[str]:
    said = cli("status", name, "--json")
    assert said.code == 0, said.err
    return [view["state"] for view in said.json]


# ---------------------------------------------------------------- killed


@pytest.mark.slow
def test_a_submission_killed_after_sbatch_is_adopted(place: Path, cli: Cli, tmp_path: Path) -> None:
    """The next submission finds the job by its token, and the job runs."""
    real = subprocess.run(["which", "sbatch"], capture_output=True, text=True, check=True).stdout
    wrapper = tmp_path / "sbatch"
    wrapper.write_text(
        f'#!/bin/sh\n{real.strip()} "$@"\ncase "$1" in --test-only) ;; *) kill -9 $PPID ;; esac\n'
    )
    wrapper.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    with hpcft("submit", "tiny.yaml", "-c", "testbed", "-o", "name=orphan", PATH=path) as killed:
        out_of(killed)
    assert killed.returncode == -9
    assert job_ids("orphan") == [None]
    (job_id,) = jobs("orphan")
    assert states(cli, "orphan") != ["FAILED"]
    said = cli("submit", "tiny.yaml", "-c", "testbed", "-o", "name=orphan", "--watch")
    assert (said.code, jobs("orphan"), job_ids("orphan")) == (0, [job_id], [job_id]), said.err
    assert states(cli, "orphan") == ["COMPLETED"]
    assert nothing_left(folder_of("orphan"))


@pytest.mark.parametrize("instants", [5, pytest.param(20, marks=pytest.mark.slow)])
def test_a_submission_killed_at_any_instant_can_be_repeated(
    waiting: Path, cli: Cli, instants: int
) -> None:
    """Every record can be read, and the next submission adopts or submits the jobs."""
    draw = random.Random(instants)
    killed, took_s = 0, 0.0
    for instant in range(1 + instants):
        name = f"killed{instants}-{instant}"
        overrides = [f"name={name}", "sweep.seeds=[1, 2]"]
        site, prepared = prepare.prepare_runs(
            "tiny.yaml", cluster_name="testbed", overrides=overrides
        )
        submit = partial(submit_runs, site, prepared, Path("runs"), again=False)
        if not instant:  # The first one is not killed: it measures how long a submission takes.
            started = time.monotonic()
            submit()
            took_s = time.monotonic() - started
            continue
        killed += killed_at(draw.uniform(0.0, 0.9 * took_s), submit)
        for reader in ("status", "collect"):
            assert cli(reader, "--json").code == 0
        assert len(live_jobs(name)) in (0, 2)
        submit()
        assert len(live_jobs(name)) == 2, "one job for each run"
        assert sorted(map(str, job_ids(name))) == sorted(live_jobs(name))
        assert {entry.outcome for entry in submit()} == {"running"}
    assert killed > instants / 2
    slurm("scancel", "--user=root")
    until(lambda: set(states(cli, f"killed{instants}-0")) == {"CANCELLED"}, 20)


def test_two_submissions_at_once_submit_one_job(waiting: Path) -> None:
    arguments = ("submit", "tiny.yaml", "-c", "testbed", "-o", "name=twice", "--json")
    with hpcft(*arguments) as one, hpcft(*arguments) as other:
        said = [json.loads(out_of(process))[0] for process in (one, other)]
    assert sorted(entry["outcome"] for entry in said) == ["running", "submitted"]
    assert {entry["job_id"] for entry in said} == set(jobs("twice"))
    assert len(jobs("twice")) == 1
    slurm("scancel", *jobs("twice"))


def test_a_job_of_a_run_that_has_another_job_ends(place: Path, cli: Cli, testbed: Any) -> None:
    """After a timeout of sbatch its job may start later, when the run has another one."""
    with closed(testbed):
        assert cli("submit", "tiny.yaml", "-c", "testbed", "-o", "name=stray").code == 0
        (stray,) = jobs("stray")
        file = folder_of("stray") / "job.json"
        job = json.loads(file.read_text())
        job["attempts"].append(job["attempts"][0] | {"job_id": "999999", "token": "another"})
        file.write_text(json.dumps(job))
    until(lambda: slurm("squeue", "-h", "-t", "all", "-j", stray, "-o", "%T") == "COMPLETED\n", 60)
    assert (
        "another job runs this run by now"
        in next(folder_of("stray").glob("logs/*_0_log.out")).read_text()
    )
    assert not (folder_of("stray") / "progress.json").exists()


# ---------------------------------------------------------------- the controller is away


def test_submit_while_the_controller_hangs_does_not_submit_twice(
    place: Path, cli: Cli, testbed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It hangs between the check and sbatch: nobody knows whether there is a job, until later."""
    arguments = ("submit", "tiny.yaml", "-c", "testbed", "-o", "name=away")
    with closed(testbed), impatient(tmp_path):
        testbed.pause("slurmctld")
        try:
            said = cli(*arguments)
            assert said.code == 3
            assert "Traceback" not in said.err
            assert not list(Path("runs").glob("away/*"))
        finally:
            testbed.resume("slurmctld")
        site, prepared = prepare.prepare_runs(
            "tiny.yaml", cluster_name="testbed", overrides=["name=away"]
        )

        real = slurm_scheduler.check_script

        def check(script: str) -> None:
            monkeypatch.setattr(slurm_scheduler, "check_script", real)
            real(script)
            testbed.pause("slurmctld")

        monkeypatch.setattr(slurm_scheduler, "check_script", check)
        try:
            with pytest.raises(ClusterError, match="may have queued the job or not"):
                submit_runs(site, prepared, Path("runs"), again=False)
            assert states(cli, "away") == ["UNKNOWN"]
            again = cli(*arguments)
            assert again.code == 2
            assert "an earlier job of this run may still be alive" in again.err
        finally:
            testbed.resume("slurmctld")
        until(lambda: jobs("away"), 20)
        said = cli(*arguments)
        assert "is already queued or running" in said.err
        assert job_ids("away") == jobs("away")
        assert len(jobs("away")) == 1
        cli("cancel", "away")


# ---------------------------------------------------------------- limits


@pytest.mark.slow
def test_submit_splits_a_sweep_above_max_array_size(place: Path, cli: Cli, testbed: Any) -> None:
    with testbed.configured(MaxArraySize="3"), closed(testbed):
        shown = cli("submit", "tiny.yaml", "-c", "testbed", "-o", "name=split", *SWEEP,
                    "--dry-run", "--json").json  # fmt: skip
        assert [len(job["runs"]) for job in shown["jobs"]] == [3, 2]
        said = cli("submit", "tiny.yaml", "-c", "testbed", "-o", "name=split", *SWEEP)
        assert said.code == 0, said.err
        assert sorted(map(str, job_ids("split"))) == sorted(jobs("split"))
        arrays = [job_id.partition("_")[0] for job_id in jobs("split")]
        assert sorted(arrays.count(array) for array in set(arrays)) == [2, 3]
        assert states(cli, "split") == ["PENDING"] * 5
        cli("cancel", "split")
        until(lambda: not live_jobs("split"), 20)


def set_max_submit_jobs(value: str) -> None:
    slurm("sacctmgr", "-i", "modify", "user", "root", "set", f"MaxSubmitJobs={value}")


def test_submit_beyond_the_job_limit_queues_as_many_as_fit(waiting: Path, cli: Cli) -> None:
    """It names the runs that are left, and a later submission queues them."""
    slurm("scancel", "--user=root")
    arguments = ("submit", "tiny.yaml", "-c", "testbed", "-o", "name=many", *SWEEP)
    set_max_submit_jobs("3")
    try:
        until(lambda: not slurm("squeue", "-h"), 20)
        said = cli(*arguments)
        assert said.code == 3
        assert "2 of 5 runs are not queued" in said.err
        assert "AssocMaxSubmitJobLimit" in said.err
        assert len(live_jobs("many")) == 3
        assert states(cli, "many") == ["PENDING"] * 3
        full = cli(*arguments)
        assert full.code == 3
        assert full.err.count("is already queued or running") == 3
        assert len(live_jobs("many")) == 3
        set_max_submit_jobs("5")
        said = cli(*arguments)
        assert said.code == 0, said.err
        assert len(live_jobs("many")) == 5
        assert sorted(map(str, job_ids("many"))) == sorted(jobs("many"))
    finally:
        set_max_submit_jobs("-1")
        cli("cancel", "many")


# ---------------------------------------------------------------- refused before anything is queued


@pytest.mark.parametrize(
    ("line", "fault", "key", "reason"),
    [
        ("account: lab", "account: nosuch", "account", "Invalid account"),
        ("partition: main\n", "partition: nosuch\n", "partition", "Invalid partition"),
        ("time_limit_min: 60", "time_limit_min: 60\nqos: nosuch", "qos", "Invalid qos"),
        ("time_limit_min: 60", "time_limit_min: 60\nconstraint: nosuch", "constraint",
         "Invalid feature"),
        ("cores_per_node: 8", "cores_per_node: 64", "gpus_per_node", "node configuration"),
    ],
    ids=["account", "partition", "qos", "constraint", "cores"],
)  # fmt: skip
def test_submit_names_the_line_of_the_profile_that_slurm_refuses(
    line: str, fault: str, key: str, reason: str, place: Path, cli: Cli
) -> None:
    text = (ROOT / "slurm/testbed.yaml").read_text().replace("[main, high]", "[main, high, nosuch]")
    assert line in text
    Path("site.yaml").write_text(text.replace(line, fault))
    said = cli("submit", "tiny.yaml", "-c", "site.yaml", "-o", "name=refused")
    assert said.code == 2, said.err
    assert f" {key}: Slurm refuses the job: " in said.err
    assert reason in said.err
    assert "site.yaml:" in said.err
    # Slurm may keep a record of a job that sbatch refused.
    assert (live_jobs("refused"), list(Path("runs").glob("refused/*"))) == ([], [])


def test_submit_ignores_sbatch_variables_of_planned_options(
    waiting: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sbatch prefers them to its script; variables of other options still apply."""
    for name, value in (("TIMELIMIT", "1"), ("PARTITION", "nosuch"), ("RESERVATION", "nosuch")):
        monkeypatch.setenv(f"SBATCH_{name}", value)
    said = cli("submit", "tiny.yaml", "-c", "testbed", "-o", "name=planned")
    assert said.code == 2
    assert "reservation" in said.err.lower()
    assert os.environ["SBATCH_PARTITION"] == "nosuch"
    monkeypatch.delenv("SBATCH_RESERVATION")
    folder = submit(cli, "planned")
    (job,) = live_jobs("planned")
    limit, partition = slurm("squeue", "-h", "-j", job, "-o", "%l %P").split()
    plan = json.loads((folder / "plan.json").read_text())
    assert parse_slurm_duration_s(limit) == 60 * plan["time_min"] > 60
    assert partition == "main"


def test_submit_refuses_more_time_than_the_partition_allows(place: Path, cli: Cli) -> None:
    """By default Slurm accepts such a job, which then waits for ever."""
    slurm("scontrol", "update", "partitionname=main", "MaxTime=5")
    try:
        said = cli("submit", "tiny.yaml", "-c", "testbed", "-o", "name=long")
        assert said.code == 2
        assert "time_limit_min: Slurm refuses the job" in said.err
        assert "main allows 5 minutes" in said.err
    finally:
        slurm("scontrol", "update", "partitionname=main", "MaxTime=INFINITE")
    assert jobs("long") == []


def test_submit_refuses_inputs_that_are_not_staged(place: Path, cli: Cli) -> None:
    said = cli("submit", "tiny.yaml", "-c", "testbed", "-o", "name=absent",
               "-o", "model={path: nobody/nothing}")  # fmt: skip
    assert said.code == 2, said.err
    assert "hpcft stage" in said.err
    assert (jobs("absent"), list(Path("runs").glob("absent/*"))) == ([], [])


# ---------------------------------------------------------------- the disk


@pytest.mark.parametrize(("size", "inodes"), [("64k", 1000), ("4m", 6)], ids=["bytes", "inodes"])
def test_submit_on_a_full_disk_submits_no_job(
    size: str, inodes: int, place: Path, cli: Cli, tmp_path: Path, testbed: Any
) -> None:
    arguments = ("submit", "tiny.yaml", "-c", "testbed", "-o", f"name=full{inodes}")
    with ExitStack() as stack:
        stack.enter_context(closed(testbed))
        try:
            disk = stack.enter_context(small_disk(tmp_path / "d", size=size, inodes=inodes))
        except PermissionError as refused:
            pytest.skip(f"no file system can be mounted here: {refused}")
        if size == "64k":
            (disk / "other").write_bytes(bytes(60 * 1024))
        said = cli(*arguments, "--runs-dir", disk)
        assert said.code == 2, said.err
        assert "No space left on device" in said.err
        assert "Traceback" not in said.err
        assert jobs(f"full{inodes}") == []
        (disk / "other").unlink(missing_ok=True)
        subprocess.run(["mount", "-o", "remount,size=8m,nr_inodes=1000", str(disk)], check=True)
        said = cli(*arguments, "--runs-dir", disk)
        assert said.code == 0, said.err
        assert len(live_jobs(f"full{inodes}")) == 1
        cli("cancel", f"full{inodes}", "--runs-dir", disk)


def test_commands_work_with_a_read_only_runs_folder(
    place: Path, cli: Cli, tmp_path: Path, testbed: Any
) -> None:
    with ExitStack() as stack:
        try:
            disk = stack.enter_context(small_disk(tmp_path / "d", size="8m", inodes=1000))
        except PermissionError as refused:
            pytest.skip(f"no file system can be mounted here: {refused}")
        stack.enter_context(closed(testbed))
        arguments = ("tiny.yaml", "-c", "testbed", "--runs-dir", disk)
        assert cli("submit", *arguments, "-o", "name=rw").code == 0
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        for reader in ("status", "collect"):
            assert cli(reader, "--json", "--runs-dir", disk).code == 0
        said = cli("submit", *arguments, "-o", "name=ro")
        assert said.code == 2, said.err
        assert "Read-only file system" in said.err
        assert jobs("ro") == []
        said = cli("cancel", "rw", "--runs-dir", disk)
        assert said.code == 0, said.err


# ---------------------------------------------------------------- a planted pickle


class Planted:
    """Object whose pickle creates a folder when it is loaded."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.canary),)


def test_no_command_loads_a_pickle_of_a_run_folder(waiting: Path, cli: Cli, tmp_path: Path) -> None:
    arguments = ("submit", "tiny.yaml", "-c", "testbed", "-o", "name=planted")
    assert cli(*arguments).code == 0
    (job_id,) = jobs("planted")
    canary = tmp_path / "loaded"
    bomb = pickle.dumps(Planted(canary))
    folder = folder_of("planted")
    for file in (*folder.glob("logs/*.pkl"), folder / f"logs/{job_id}_0_result.pkl",
                 folder / "result.pkl", folder / "logs/planted.pkl"):  # fmt: skip
        file.write_bytes(bomb)
    readers = (("status", "--json"), ("status", "planted"), ("collect", "--json"))
    for command in (*readers, arguments, ("logs", "planted"), ("cancel", "planted"), arguments):
        cli(*command)
    assert not canary.exists()
    pickle.loads(bomb)
    assert canary.exists(), "the pickle works"
    cli("cancel", "planted")


# ---------------------------------------------------------------- the session of the submission


@pytest.mark.process
def test_a_job_submitted_inside_an_allocation_is_free_of_it(place: Path, cli: Cli) -> None:
    """The session has options of its own, soft limits and a folder with odd modules in it."""
    for name in ("datasets", "tokenizers", "random"):
        Path(f"{name}.py").write_text("raise SystemExit('a module of the folder was imported')\n")
    try:
        command = (
            f"ulimit -St 5; unset PYTHONSAFEPATH; "
            f"export SLURM_MEM_PER_CPU=100 SLURM_MEM_PER_NODE=900 "
            f"SLURM_CPU_BIND=quiet,mask_cpu:0x1 SLURM_TRES_PER_TASK=cpu=1 SRUN_DEBUG=3; "
            f"exec {sys.executable} -P -m hpcft submit tiny.yaml -c testbed -o name=inside"
        )
        slurm("srun", "-N1", "-n1", "--mem=2000", "--overcommit", "bash", "-c", command)
    finally:
        for name in ("datasets", "tokenizers", "random"):
            Path(f"{name}.py").unlink()
    until(lambda: states(cli, "inside")[0] not in ("PENDING", "RUNNING"), 120)
    assert states(cli, "inside") == ["COMPLETED"]
    assert len(jobs("inside")) == 1
    log = next(folder_of("inside").glob("logs/*_0_log.err")).read_text()
    assert "srun: " not in log, "SRUN_DEBUG did not arrive"


def test_a_job_that_got_the_id_of_a_run_is_neither_shown_nor_cancelled(
    waiting: Path, cli: Cli
) -> None:
    """A controller that has lost its state counts from 1 again."""
    folder = submit(cli, "reused")
    (own,) = jobs("reused")
    other = slurm("sbatch", "--parsable", "-o", "/dev/null", "--wrap", "sleep 300").strip()
    file = folder / "job.json"
    file.write_text(file.read_text().replace(f'"{own}"', f'"{other}"'))
    assert states(cli, "reused") == ["UNKNOWN"]
    said = cli("cancel", "reused")
    assert f"job {other} of this cluster is another one by now" in said.err + said.out
    assert slurm("squeue", "-h", "-j", other, "-o", "%T") == "PENDING\n"
    slurm("scancel", other, own)


def test_a_run_of_another_cluster_is_neither_shown_nor_submitted_again(
    waiting: Path, cli: Cli
) -> None:
    """Two clusters share the runs folder."""
    folder = submit(cli, "shared")
    (own,) = jobs("shared")
    slurm("scancel", own)
    file = folder / "job.json"
    text = file.read_text()
    assert '"slurm_cluster": "testbed"' in text
    file.write_text(text.replace('"slurm_cluster": "testbed"', '"slurm_cluster": "east"'))
    assert states(cli, "shared") == ["UNKNOWN"]
    said = cli("cancel", "shared")
    assert (said.code, "the cluster east: look there" in said.err) == (3, True)
    said = cli("submit", "tiny.yaml", "-c", "testbed", "-o", "name=shared")
    assert said.code == 2
    assert "may still be alive" in said.err


def test_submit_shows_the_words_of_the_site(
    place: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A site's plugin speaks before Slurm does, and its constraint is not the profile's."""
    (tmp_path / "sbatch").write_text(
        "#!/bin/sh\necho 'sbatch: error: project lab has no hours left' >&2\n"
        "echo 'allocation failure: Invalid feature specification' >&2; exit 1\n"
    )
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    said = cli("submit", "tiny.yaml", "-c", "testbed", "-o", "name=words")
    assert said.code == 2
    assert "project lab has no hours left; Invalid feature specification" in said.err
    assert "testbed.yaml:1: Slurm refuses" in said.err, "no field is to blame"

"""What `hpcft resume` refuses, and the plan with which it resumes."""

from __future__ import annotations

import json

import pytest

from builders import Cli
from hpcft.core.files import read_record
from hpcft.core.paths import RunPaths
from hpcft.core.records import Plan
from hpcft.recovery.log import read_recoveries, write_current_plan


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "there is nothing to resume"),
        (["train.logging_steps=7"], "is complete; train it longer, for example with -o "
         "train.num_train_epochs=5"),
        (["train.max_steps=9"], "has no checkpoint to resume from"),
        (["train.learning_rate=1e-3"], "train.learning_rate cannot change when a run resumes"),
    ],
)  # fmt: skip
def test_resume_of_a_completed_run_refuses(
    overrides: list[str], message: str, completed: RunPaths, cli: Cli
) -> None:
    options = [word for override in overrides for word in ("-o", override)]
    said = cli("resume", completed.folder.name, *options)
    assert said.code == 2
    assert message in said.err


def test_resume_of_a_run_on_another_machine_refuses(submitted: RunPaths, cli: Cli) -> None:
    job = json.loads(submitted.job.read_text())
    job["attempts"][0]["host"] = "elsewhere"
    submitted.job.write_text(json.dumps(job))
    said = cli("resume", "tiny")
    assert said.code == 2
    assert "its job may still be alive" in said.err
    assert "runs on elsewhere: look there" in said.err


def test_resume_without_changes_takes_the_layout_in_which_the_run_ended(
    submitted: RunPaths, cli: Cli
) -> None:
    plan = read_record(submitted.plan, Plan)
    smaller = plan.layout.model_copy(update={"per_device_train_batch_size": 1})
    write_current_plan(submitted, plan.model_copy(update={"layout": smaller}), 0)
    said = cli("resume", "tiny")
    assert said.code == 0, said.err
    assert "resumes from the beginning" in said.err
    for file in (submitted.plan, submitted.current_plan):
        assert read_record(file, Plan).layout == smaller
    assert read_record(submitted.current_plan, Plan).recovery_number == 1
    (recovery,) = read_recoveries(submitted)
    assert (recovery.action, recovery.evidence) == ("resume", "a person resumed it")
    assert len(json.loads(submitted.job.read_text())["attempts"]) == 2


def test_resume_with_another_layout_plans_it(submitted: RunPaths, cli: Cli) -> None:
    said = cli("resume", "tiny", "-o", "train.per_device_train_batch_size=1")
    assert said.code == 0, said.err
    layout = read_record(submitted.current_plan, Plan).layout
    assert layout.per_device_train_batch_size == 1
    assert read_record(submitted.plan, Plan).layout == layout

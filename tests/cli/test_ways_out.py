"""Tests of common slips at the command line: the message names the way out."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from builders import RECIPE, Cli


def refusal(cli: Cli, *arguments: object) -> str:
    """Returns the message of a command that refuses its input."""
    said = cli(*arguments)
    assert (said.code, said.out) == (2, ""), said
    return said.err


@pytest.mark.parametrize("verb", ["plan", "submit"])
@pytest.mark.parametrize(
    ("slip", "way_out"),
    [
        (["quickstrat"], "quickstrat: there is no such file; did you mean quickstart?"),
        (["Tiny"], "Tiny: there is no such file; did you mean tiny.yaml?"),
        (["tiny.yml"], "tiny.yml: there is no such file; did you mean tiny.yaml?"),
        (["wholly-different"], "correct the name; `hpcft recipes` lists the recipes"),
        (["."], ".: is a folder, expected a file; name the file in it"),
        (["tiny.yaml", "-o", "train.seed 1"], "-o train.seed 1: expected dotted.field=value"),
        (["tiny.yaml", "-o", "train.lr=1e-4"], "train.lr: unknown key; did you mean learning_rate"),
        (["tiny.yaml", "-o", "train.epochs=1"], "did you mean num_train_epochs?"),
        (["tiny.yaml", "-o", "train.batch_size=8"], "did you mean global_batch_size?"),
        (["tiny.yaml", "-o", "train=5"], "train: expected a mapping, got 5\n"),
        (["tiny.yaml", "-c", "lcal"], "there is no such profile; did you mean local?"),
        (["tiny.yaml", "-c", "site.txt"], "has the suffix '.txt', expected .yaml; rename the file"),
        (["tiny.yaml", "-c", "."], "is a folder, expected the file of a profile"),
    ],
)
def test_a_slip_is_answered_with_the_way_out(
    slip: list[str], way_out: str, verb: str, tiny: Path, cli: Cli
) -> None:
    Path("site.txt").write_text("name: site\n")
    cluster = [] if "-c" in slip else ["-c", "local"]
    assert way_out in refusal(cli, verb, *slip, *cluster)


def test_a_name_in_the_place_of_a_section_is_answered_with_the_section(
    tiny: Path, cli: Cli
) -> None:
    model = next(line for line in RECIPE.splitlines() if line.startswith("model:"))
    assert model == "model:"
    text = RECIPE.replace("method: { name: full }", "method: full")
    text = text[: text.index("model:")] + "model: gpt2\n" + text[text.index("task:") :]
    tiny.write_text(text)
    said = refusal(cli, "plan", "tiny.yaml", "-c", "local")
    assert 'model: expected a mapping, got "gpt2"; write model: { path: "gpt2" }' in said
    assert 'method: expected a mapping, got "full"; write method: { name: "full" }' in said


@pytest.mark.parametrize("override", [["train.seed", "1"], ["a", "b"]])
def test_plan_with_a_blank_in_an_override_is_refused(
    override: list[str], tiny: Path, cli: Cli
) -> None:
    """The word after the blank is taken for another recipe."""
    said = refusal(cli, "plan", "tiny.yaml", "-c", "local", "-o", *override)
    assert f"-o {override[0]}: expected dotted.field=value" in said
    assert "without blanks" in said


def test_plan_of_several_recipes_one_of_which_is_missing_is_refused(tiny: Path, cli: Cli) -> None:
    said = refusal(cli, "plan", "tiny.yaml", "nosuch", "tniy.yaml", "-c", "local")
    assert "nosuch: there is no such file" in said
    assert "tniy.yaml: there is no such file; did you mean tiny.yaml?" in said


def test_a_recipe_from_a_pipe_is_refused(tiny: Path, cli: Cli) -> None:
    """`hpcft plan <(…)`: relative paths in it would start from nowhere."""
    os.mkfifo("pipe")
    writer = threading.Thread(target=lambda: os.close(os.open("pipe", os.O_RDWR)))
    writer.start()
    said = refusal(cli, "plan", "pipe", "-c", "local")
    writer.join()
    assert "pipe: is a pipe or a device, expected a regular file; write it to a file" in said

"""Tests the sample of row lengths against what a run prepares."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from builders import Cli, load_one
from hpcft.core.files import write_record
from hpcft.core.paths import RunPaths
from hpcft.core.records import Fingerprints
from hpcft.jobs import sampled_lengths
from hpcft.jobs.sampled_lengths import sample_lengths
from hpcft.training.data.prepare import load_split, prepare_data

pytestmark = pytest.mark.usefixtures("cache_of_this_module")


def test_sampled_lengths_are_those_that_a_run_prepares(tiny: Path) -> None:
    made = load_one()
    known = sample_lengths(made, fixed=False)
    assert known is not None
    paths = RunPaths(tiny.parent / "run")
    paths.folder.mkdir()
    write_record(paths.recipe, made)
    write_record(paths.fingerprints, Fingerprints(files={}))
    prepare_data(paths, made)
    for split in ("train", "test"):
        prepared = load_split(paths, split)
        assert prepared is not None
        assert known.counts[split] == Counter(prepared.lengths)


def test_sample_has_rows_of_all_parts(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are often sorted: the first rows would be of one kind."""
    monkeypatch.setattr(sampled_lengths, "SAMPLED_ROWS", 4)
    lines = (tiny.parent / "train.jsonl").read_text().splitlines()
    longer = [line.replace("film", "very " * n + "film") for n, line in enumerate(lines)]
    (tiny.parent / "train.jsonl").write_text("\n".join(longer))
    known = sample_lengths(load_one(), fixed=False)
    assert known is not None
    assert sum(known.counts["train"].values()) == 4
    assert max(known.counts["train"]) > min(known.counts["train"]) + 10


def test_lengths_are_sampled_again_for_other_rows_only(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sample_lengths(load_one(), fixed=False)
    with monkeypatch.context() as patch:
        patch.setattr(sampled_lengths, "_sample", lambda _: pytest.fail("it is in the cache"))
        assert sample_lengths(load_one(), fixed=False) == before
    text = (tiny.parent / "train.jsonl").read_text()
    (tiny.parent / "train.jsonl").write_text(text.replace("a fine", "a truly very fine"))
    assert sample_lengths(load_one(), fixed=False) != before


def test_prompts_count_what_is_their_own(asked: Path) -> None:
    """Tokens are bytes here; those of the shots are run once."""
    made = load_one(name="asked.yaml")
    known = sample_lengths(made, fixed=False)
    assert known is not None
    (lengths,) = known.counts.values()
    assert sum(lengths.values()) == 40
    longest = "Review: a play, number 39" + 6 * " indeed" + "\nIt is good"
    assert 10 < min(lengths) < max(lengths) <= len(longest)
    alone = sample_lengths(load_one("task.shots=0", name="asked.yaml"), fixed=False)
    assert alone is not None
    assert max(alone.counts["test"]) < len(longest)


def test_nothing_is_sampled_where_rows_or_tokenizer_are_elsewhere(tiny: Path) -> None:
    made = load_one()
    data = made.task.data.model_copy(update={"files": None, "path": "stanfordnlp/imdb"})
    away = made.model_copy(update={"task": made.task.model_copy(update={"data": data})})
    assert sample_lengths(away, fixed=False) is None
    model = made.model_copy(
        update={"model": made.model.model_copy(update={"tokenizer": "bert-base-uncased"})}
    )
    assert sample_lengths(model, fixed=False) is None


def test_plan_and_submit_say_what_the_time_is_based_on(cli: Cli, tiny: Path) -> None:
    reason = "time by 24 rows of train:"
    assert reason in cli("plan", tiny, "-c", "cpu").err
    (run,) = cli("submit", tiny, "-c", "local", "--dry-run", "--json").json["runs"]
    assert any(why.startswith(reason) for why in run["plan"]["reasons"])

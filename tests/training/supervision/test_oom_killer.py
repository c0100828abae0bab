"""Tests of the counters of the kernel's out-of-memory killer."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpcft.training.supervision import oom_killer
from hpcft.training.supervision.oom_killer import OomKillCounter, find_counter_files


def test_find_counter_files_prefers_the_cgroup_to_the_node(tmp_path: Path) -> None:
    proc, cgroups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "vmstat").write_text("nr_free_pages 7\noom_kill 3\n")
    assert find_counter_files(proc, cgroups) == [proc / "vmstat"]
    (proc / "self/cgroup").write_text("4:cpu,memory:/job_7\n1:cpu:/\n0::/step_0\n")
    assert find_counter_files(proc, cgroups) == [proc / "vmstat"], "the cgroups do not exist"
    for name, text in (("memory/job_7/memory.oom_control", "under_oom 0\noom_kill 1\n"),
                       ("step_0/memory.events", "low 0\noom 2\noom_kill 2\n")):  # fmt: skip
        (cgroups / name).parent.mkdir(parents=True)
        (cgroups / name).write_text(text)
    files = find_counter_files(proc, cgroups)
    assert [file.name for file in files] == ["memory.oom_control", "memory.events"]


def test_has_risen_compares_within_the_window_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "memory.events"
    file.write_text("oom_kill 1\n")
    monkeypatch.setattr(oom_killer, "find_counter_files", lambda: [file])
    monkeypatch.setattr(oom_killer, "INTERVAL_S", 0.0)
    counter = OomKillCounter()
    assert not counter.has_risen()
    file.write_text("oom_kill 2\n")
    assert counter.has_risen()
    monkeypatch.setattr(oom_killer, "WINDOW_S", 0.0)
    counter.poll()
    counter.poll()
    assert not counter.has_risen(), "the kill was before the window"

"""The cluster profile that is used without `--cluster`."""

from __future__ import annotations

from pathlib import Path

import pytest

from builders import SITE, write_file
from fake_slurm import fake_commands
from hpcft.core.errors import InputError
from hpcft.jobs.default_cluster import detect_cluster


def test_detect_cluster_without_slurm_is_local(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda command: None)
    assert detect_cluster() == "local"


def test_detect_cluster_takes_the_profile_of_slurms_name(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda command: f"/usr/bin/{command}")
    fake_commands(monkeypatch, scontrol="ClusterName = campus\n")
    with pytest.raises(InputError, match=r"Slurm cluster campus, but .* slurm/campus\.yaml"):
        detect_cluster()
    write_file("slurm/campus.yaml", SITE.replace("name: site", "name: campus"))
    assert detect_cluster() == "campus"
    monkeypatch.setenv("HPCFT_CLUSTER", "other")
    assert detect_cluster() == "other"

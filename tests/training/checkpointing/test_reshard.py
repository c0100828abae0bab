"""Tests of which checkpoint a run resumes from."""

from __future__ import annotations

from pathlib import Path

from builders import cluster, facts, layout, plan_of, recipe, write_checkpoint
from hpcft.core.paths import RunPaths
from hpcft.training.checkpointing.reshard import find_resume_checkpoint


def test_find_resume_checkpoint_with_states_on_a_nodes_disk_starts_again_with_a_note(
    tmp_path: Path,
) -> None:
    """DeepSpeed would resume with new moments: another training, and nothing would say so."""
    site = cluster("a100-80")
    plan = plan_of(recipe(), site, facts(100_000_000))
    planned = plan.model_copy(update={"layout": layout(3, offload_optimizer="nvme")})
    paths = RunPaths(tmp_path)
    write_checkpoint(paths, 8, layout=planned.layout)
    checkpoint, (note,) = find_resume_checkpoint(paths, planned)
    assert checkpoint is None
    assert note.startswith("checkpoint-8 cannot be resumed from (optimizer states on a node's disk")
    write_checkpoint(paths, 9, layout=layout(3))
    kept = plan.model_copy(update={"layout": layout(3)})
    assert find_resume_checkpoint(paths, kept)[0] is not None

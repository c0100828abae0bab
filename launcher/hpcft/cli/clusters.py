"""`hpcft clusters`: lists the cluster profiles that come with hpcft."""

from __future__ import annotations

from hpcft.cli.options import Json


def clusters(json: Json = False) -> None:
    """List the shipped cluster profiles.

    For your own cluster, copy the one that is most similar to slurm/NAME.yaml and change it.
    """
    # Imported here, so that `hpcft --help` is quick.
    from hpcft.cli import console
    from hpcft.config.cluster_profile import list_profiles, load_profile

    profiles = [load_profile(str(path)).cluster for path in list_profiles()]
    if json:
        console.as_json([cluster.model_dump(mode="json") for cluster in profiles])
        return
    header = ["cluster", "nodes", "GPUs per node", "GPU", "memory per node", "description"]
    cells = [
        [c.name, str(c.max_nodes), str(c.gpus_per_node) if c.gpus_per_node else "",
         f"{c.gpu.name} {c.gpu.memory_gib:g} GiB" if c.gpu else "",
         f"{c.host_memory_gib:.0f} GiB", c.description]
        for c in profiles
    ]  # fmt: skip
    console.table(header, cells, right={"nodes", "GPUs per node", "memory per node"})

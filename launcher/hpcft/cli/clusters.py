"""`hpcft clusters`: the profiles that travel with hpcft, and those of this folder."""

from __future__ import annotations

import typer

from hpcft.cli.options import Json


def add_to(app: typer.Typer) -> None:
    """Registers the verb."""

    @app.command()
    def clusters(json: Json = False) -> None:
        """List the cluster profiles, a line each."""
        from hpcft.cli import console
        from hpcft.config import cluster_profile

        found = [
            cluster_profile.load_profile(str(path)).cluster
            for path in cluster_profile.list_profiles()
        ]
        if json:
            console.as_json([cluster.model_dump(mode="json") for cluster in found])
            return
        header = ["cluster", "nodes", "GPUs a node", "GPU", "memory a node", "description"]
        cells = [
            [c.name, str(c.max_nodes), str(c.gpus_per_node) if c.gpus_per_node else "",
             f"{c.gpu.name} {c.gpu.memory_gib:g} GiB" if c.gpu else "",
             f"{c.host_memory_gib:.0f} GiB", c.description]
            for c in found
        ]  # fmt: skip
        console.table(header, cells, right={"nodes", "GPUs a node", "memory a node"})

"""Clusters: profiles, Slurm through submitit, this machine; the only callers of a scheduler."""

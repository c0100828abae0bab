"""hpcft: fine-tune language models on a Slurm cluster; what it accepts fits and is right."""

__version__ = "0.2.0"

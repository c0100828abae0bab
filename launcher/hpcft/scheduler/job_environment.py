"""Makes the environment of a new job: that of the submitting session, without its own job."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

DEFAULT_VARIABLES = {
    name: f"SBATCH_{name.upper()}"
    for name in ("account", "constraint", "partition", "qos", "reservation")
}
"""Options of sbatch to the variables in which a site or a user may set them for all jobs."""

# Inside an allocation (salloc, JupyterHub, VS Code on a node) these describe the session's job.
# sbatch, which hands its environment to the new job, and the srun in it take them for options.
_PREFIXES = ("SLURM_", "SLURMD_", "SRUN_", "SBATCH_", "SUBMITIT_", "PMI_", "PMIX_", "OMPI_COMM_",
             "OMPI_MCA_orte_", "OMPI_UNIVERSE_", "PALS_", "HYDRA_", "MPI_LOCAL")  # fmt: skip
_SESSION_VARIABLES = {"PYTHONIOENCODING", "MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE",
                      "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK",
                      "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"}  # fmt: skip
# Where the commands find Slurm and how they log in: the same for a job as for the session.
_KEPT = {"SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SLURM_JWT"}
_GPU_VARIABLES = {"CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "NVIDIA_VISIBLE_DEVICES",
                  "GPU_DEVICE_ORDINAL", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES",
                  "ZE_AFFINITY_MASK"}  # fmt: skip

PYTHON_VARIABLES = {
    # The folder of submission is not searched for modules: a `datasets.py` in it would take the
    # place of the library, and in a shared folder others could put one there.
    "PYTHONSAFEPATH": "1",
    # Libraries, too, write UTF-8 whatever the locale of the session.
    "PYTHONUTF8": "1",
}
"""Variables for the Python of all processes of a job, those of libraries included."""


def without_session_job() -> dict[str, str]:
    """Returns this process's environment without what describes a job that it runs in."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name in _KEPT or not (name.startswith(_PREFIXES) or name in _SESSION_VARIABLES)
    }
    if "PYTHONPATH" in kept:
        kept["PYTHONPATH"] = _without_current_folder(kept["PYTHONPATH"])
    return kept


def submission_environment(options: Collection[str]) -> dict[str, str]:
    """Returns the environment in which sbatch runs, and which the job inherits.

    Args:
        options: options in the script; variables of a site or user may set the others. sbatch
            would prefer a variable to an option of its script.
    """
    environment = {
        name: value for name, value in without_session_job().items() if name not in _GPU_VARIABLES
    }
    defaults = {variable for name, variable in DEFAULT_VARIABLES.items() if name not in options}
    return environment | {name: os.environ[name] for name in defaults & os.environ.keys()}


def _without_current_folder(python_path: str) -> str:
    """Returns a PYTHONPATH of absolute folders, without entries that mean the current one.

    `PYTHONPATH=$PYTHONPATH:/own` begins with an empty entry where the variable was not set.
    """
    here = Path.cwd()
    folders = [here / entry for entry in python_path.split(os.pathsep) if entry]
    return os.pathsep.join(str(folder) for folder in folders if folder != here)

"""Finds staged inputs in the Hugging Face cache, without network, and checks for changes.

hpcft uses the layout of the cache as it is. In a repository's folder it adds a record for each
input that was staged from there; deleting the repository deletes the records too.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from pathlib import Path

from hpcft.config.recipe_types import FullRecipe
from hpcft.core.errors import DataError, UsageError
from hpcft.core.files import read_record, read_record_if_exists, write_record
from hpcft.core.paths import RunPaths
from hpcft.core.records import Cluster, Staged, StagedFile, StagedInputs
from hpcft.staging import hub_inputs
from hpcft.staging.hub_inputs import HubInput


def job_environment(cluster: Cluster) -> dict[str, str]:
    """Returns the environment of jobs: this process's, with the variables that the profile sets."""
    return {**os.environ, **cluster.environment}


def hub_cache_folder(variables: Mapping[str, str]) -> Path:
    """Returns the folder of the Hugging Face cache, from the variables that its libraries read."""
    named = variables.get("HF_HUB_CACHE") or variables.get("HUGGINGFACE_HUB_CACHE")
    base = variables.get("XDG_CACHE_HOME") or "~/.cache"
    home = variables.get("HF_HOME") or os.path.join(base, "huggingface")
    return Path(os.path.expandvars(os.path.expanduser(named or os.path.join(home, "hub"))))


def staged_record_file(hub_input: HubInput, cache: Path) -> Path:
    """Returns the file of the record of a staged input."""
    words = [hub_input.kind, *([hub_input.config_name] if hub_input.config_name else [])]
    revision = hub_input.revision.replace("/", "--")
    folder = cache / hub_input.cache_folder_name / "hpcft"
    return folder / f"{'-'.join(words)}@{revision}.json"


def read_staged(hub_input: HubInput, cache: Path) -> Staged | None:
    """Reads the record of a staged input; returns None if it has not been staged."""
    return read_record_if_exists(staged_record_file(hub_input, cache), Staged)


def write_staged(hub_input: HubInput, cache: Path, staged: Staged) -> None:
    """Writes the record of a staged input, readable by everybody who may read the cache."""
    file = staged_record_file(hub_input, cache)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_record(file, staged)
    file.chmod(file.parent.stat().st_mode & 0o666)  # `write_record` makes files private


def read_file_state(folder: Path, name: str) -> StagedFile:
    """Returns size and time of a file, without its hash.

    Raises:
        OSError: there is no such file.
    """
    info = (folder / name).stat()
    return StagedFile(size_bytes=info.st_size, mtime_ns=info.st_mtime_ns)


def changed_since_staging(staged: Staged) -> str:
    """Returns how a staged file has changed since it was staged; empty if none has."""
    folder = Path(staged.folder)
    for name, file in staged.files.items():
        try:
            now = read_file_state(folder, name)
        except OSError:
            return f"{folder / name} was deleted after it was staged"
        if now.size_bytes != file.size_bytes:
            return f"{folder / name} was changed after it was staged"
    return ""


def find_staged(recipe: FullRecipe, cache: Path) -> tuple[dict[str, Staged], list[str]]:
    """Finds the staged inputs of a recipe.

    Args:
        recipe: a recipe with hub names.
        cache: folder of the Hugging Face cache.

    Returns:
        The staged inputs by dotted field, and a line for each input that is missing.
    """
    by_field, missing = {}, []
    for field, hub_input in hub_inputs.hub_inputs_of(recipe).items():
        staged = read_staged(hub_input, cache)
        reason = changed_since_staging(staged) if staged else "has not been staged"
        if staged and not reason:
            by_field[field] = staged
        else:
            missing.append(f"{hub_input}: {reason}")
    return by_field, missing


def resolve_staged(recipe: FullRecipe, cluster: Cluster) -> FullRecipe:
    """Returns the recipe with the folders of staged inputs; missing inputs stay hub names."""
    staged, _ = find_staged(recipe, hub_cache_folder(job_environment(cluster)))
    return hub_inputs.with_folders(recipe, staged)


def not_staged_error(
    missing: list[str], cache: Path, *, recipe: str, cluster: str | None, overrides: list[str]
) -> UsageError:
    """Returns the error that lists missing inputs, with the command that downloads them.

    Args:
        missing: a line for each missing input.
        cache: folder of the Hugging Face cache.
        recipe: the recipe as the user gave it.
        cluster: the profile as the user gave it.
        overrides: the `-o` texts as the user gave them.
    """
    options = ["-c", cluster] if cluster else []
    options += [word for text in overrides for word in ("-o", text)]
    command = shlex.join(["hpcft", "stage", recipe, *options])
    lines = "".join(f"\n  {line}" for line in dict.fromkeys(missing))
    return UsageError(
        f"{recipe}: jobs run without network and need files that are not in the cache {cache}:"
        f"{lines}\n"
        f"  download them on a node with network, such as a login node: {command}"
    )


# ---------------------------------------------------------------- in a job


def load_run_recipe(paths: RunPaths) -> FullRecipe:
    """Reads the recipe of a run, with the staged folders in the place of hub names."""
    staged = read_record_if_exists(paths.staged, StagedInputs) or StagedInputs()
    return hub_inputs.with_folders(read_record(paths.recipe, FullRecipe), staged.inputs)


def check_staged_of_run(paths: RunPaths) -> None:
    """Checks on a compute node that the staged inputs of a run are unchanged.

    Raises:
        DataError: a file is missing or has changed.
    """
    staged = read_record_if_exists(paths.staged, StagedInputs) or StagedInputs()
    for field, item in staged.inputs.items():
        if change := changed_since_staging(item):
            raise DataError(
                f"{field}: {item.name}: {change} (seen on node {os.uname().nodename}); run `hpcft "
                "stage` again, with HF_HOME on a file system that the compute nodes share"
            )

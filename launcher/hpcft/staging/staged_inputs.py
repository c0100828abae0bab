"""What lies in the shared cache: found without network, and whether it is still as it was staged.

The cache is Hugging Face's own, in its own layout. In each repository's folder lies one small file
of ours for each thing that was staged from it; deleting the repository deletes that too.
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


def environment(cluster: Cluster) -> dict[str, str]:
    """This process's environment with what the profile sets for jobs: they share one cache."""
    return {**os.environ, **cluster.environment}


def hub_folder(variables: Mapping[str, str]) -> Path:
    """Where Hugging Face libraries keep what they fetch, by the variables that they go by."""
    named = variables.get("HF_HUB_CACHE") or variables.get("HUGGINGFACE_HUB_CACHE")
    base = variables.get("XDG_CACHE_HOME") or "~/.cache"
    home = variables.get("HF_HOME") or os.path.join(base, "huggingface")
    return Path(os.path.expandvars(os.path.expanduser(named or os.path.join(home, "hub"))))


def staged_file(need: HubInput, hub: Path) -> Path:
    """Where it is noted that something was staged."""
    words = [need.kind, *([need.config_name] if need.config_name else [])]
    revision = need.revision.replace("/", "--")
    return hub / need.repository / "hpcft" / f"{'-'.join(words)}@{revision}.json"


def read_staged(need: HubInput, hub: Path) -> Staged | None:
    """What was staged for a need; None where nothing was."""
    return read_record_if_exists(staged_file(need, hub), Staged)


def write_staged(need: HubInput, hub: Path, staged: Staged) -> None:
    """Notes what was staged, for whoever may read the cache."""
    file = staged_file(need, hub)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_record(file, staged)
    file.chmod(file.parent.stat().st_mode & 0o666)  # files are written private by themselves


def file_state(folder: Path, name: str) -> StagedFile:
    """A file as it is now, without its hash.

    Raises:
        OSError: it is not there.
    """
    info = (folder / name).stat()
    return StagedFile(size_bytes=info.st_size, mtime_ns=info.st_mtime_ns)


def changed_since_staging(staged: Staged) -> str:
    """What has become of staged files since; empty if they are as they were."""
    folder = Path(staged.folder)
    for name, file in staged.files.items():
        try:
            now = file_state(folder, name)
        except OSError:
            return f"{folder / name} is gone since it was staged"
        if now.size_bytes != file.size_bytes:
            return f"{folder / name} has changed since it was staged"
    return ""


def find_staged(recipe: FullRecipe, hub: Path) -> tuple[dict[str, Staged], list[str]]:
    """What stands for each hub name of a recipe, and a line for each that nothing stands for."""
    found, missing = {}, []
    for field, need in hub_inputs.hub_inputs_of(recipe).items():
        staged = read_staged(need, hub)
        lack = changed_since_staging(staged) if staged else "has not been staged"
        if staged and not lack:
            found[field] = staged
        else:
            missing.append(f"{need}: {lack}")
    return found, missing


def resolve_staged(recipe: FullRecipe, cluster: Cluster) -> FullRecipe:
    """The recipe with the folders of what is staged; the rest stays a name of the hub."""
    staged, _ = find_staged(recipe, hub_folder(environment(cluster)))
    return hub_inputs.with_folders(recipe, staged)


def not_staged_error(
    missing: list[str], hub: Path, recipe: str, cluster: str | None, overrides: list[str]
) -> UsageError:
    """The refusal that lists what is missing in the cache, and the command that fetches it."""
    chosen = ["-c", cluster] if cluster else []
    changed = [word for text in overrides for word in ("-o", text)]
    command = shlex.join(["hpcft", "stage", recipe, *chosen, *changed])
    lines = "".join(f"\n  {line}" for line in dict.fromkeys(missing))
    return UsageError(
        f"{recipe}: compute nodes have no network, and the cache {hub} lacks:{lines}\n"
        f"  fetch and check it on a node with network: {command}"
    )


# ---------------------------------------------------------------- in a job


def load_run_recipe(paths: RunPaths) -> FullRecipe:
    """The recipe of a run as its ranks read it: with folders in the place of hub names."""
    staged = read_record_if_exists(paths.staged, StagedInputs) or StagedInputs()
    return hub_inputs.with_folders(read_record(paths.recipe, FullRecipe), staged.inputs)


def check_staged_of_run(paths: RunPaths) -> None:
    """Checks on the compute node that the staged inputs of a run are there.

    Raises:
        DataError: a file is gone or has changed.
    """
    staged = read_record_if_exists(paths.staged, StagedInputs) or StagedInputs()
    for field, item in staged.inputs.items():
        if lack := changed_since_staging(item):
            fix = "stage it again, on a file system that the compute nodes share (HF_HOME)"
            raise DataError(
                f"{field}: {item.name}: {lack}, as {os.uname().nodename} sees it; {fix}"
            )

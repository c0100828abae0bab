"""Lists and downloads files of the Hugging Face hub, and explains its errors."""

from __future__ import annotations

import contextlib
import fnmatch
import io
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpcft.core.errors import DataError, HubError, first_line
from hpcft.core.units import format_bytes
from hpcft.staging.hub_inputs import HubInput

WEIGHTS_INDEX = "model.safetensors.index.json"
WEIGHTS_FILE = "model.safetensors"
CONFIGS = ("config.json", "generation_config.json")
TOKENIZERS = (
    "tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
    "*.model", "*.tiktoken", "chat_template.*",
)  # fmt: skip
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
PROGRESS_EVERY_S = 10.0
STALE_DOWNLOAD_S = 3600.0  # no process works on a file that has not grown for so long


@dataclass(frozen=True)
class HubFile:
    """Size and hash of a file on the hub."""

    size_bytes: int
    """Size of the file in bytes."""
    digest: str
    """SHA-256 of a large file, Git's SHA-1 of a small one."""


@dataclass(frozen=True)
class HubListing:
    """Commit and files of a hub input at this moment."""

    commit: str
    """Commit that the input's revision stands for."""
    files: dict[str, HubFile]
    """Files to download, by path in the repository."""
    data_files: dict[str, list[str]] = field(default_factory=dict)
    """Files of each split of a data set, by path in the repository."""
    builder: Any = field(default=None, compare=False)
    """The `datasets.DatasetBuilder` of a data set; None for other inputs."""

    @property
    def splits(self) -> tuple[str, ...]:
        """Splits of a data set."""
        return tuple(self.data_files)

    @property
    def size_bytes(self) -> int:
        """Size of all files in bytes."""
        return sum(file.size_bytes for file in self.files.values())


@contextlib.contextmanager
def translate_errors(hub_input: HubInput) -> Iterator[None]:
    """Turns errors of the Hugging Face libraries into sentences that say what to do.

    Raises:
        DataError: the name or the revision is wrong, or access is not allowed.
        HubError: the hub cannot be reached or does not respond.
    """
    import datasets
    import httpx2
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError:
        raise DataError(
            f"{hub_input}: is gated; accept the terms on its page on the hub, then log in "
            "(`hf auth login`, or HF_TOKEN in the environment)"
        ) from None
    except errors.RepositoryNotFoundError:
        raise DataError(
            f"{hub_input}: the hub has no repository of that name, or it is private; correct the "
            "name, or log in (`hf auth login`, or HF_TOKEN in the environment)"
        ) from None
    except errors.RevisionNotFoundError:
        fix = "give a branch, a tag or a whole commit"
        raise DataError(f"{hub_input}: there is no revision {hub_input.revision}; {fix}") from None
    except errors.OfflineModeIsEnabled:
        raise HubError(f"{hub_input}: HF_HUB_OFFLINE is set; unset it to download") from None
    except (
        datasets.exceptions.DatasetNotFoundError,
        datasets.exceptions.DataFilesNotFoundError,
        datasets.data_files.EmptyDatasetError,
        ValueError,
        RuntimeError,
    ) as error:
        raise DataError(f"{hub_input}: {_data_set_error_text(error)}") from None
    except (httpx2.HTTPError, ConnectionError, errors.LocalEntryNotFoundError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            raise DataError(
                f"{hub_input}: the hub refuses access; log in (`hf auth login`, or HF_TOKEN in the "
                "environment)"
            ) from None
        what = f"answered {status}" if status else f"cannot be reached ({first_line(error)})"
        fix = "try again on a node with network, such as a login node; downloaded files are kept"
        raise HubError(f"{hub_input}: {_endpoint()} {what}; {fix}") from None


def _endpoint() -> str:
    from huggingface_hub import constants

    return constants.ENDPOINT


def _data_set_error_text(error: BaseException) -> str:
    """Returns the text of an error of `datasets` in the words of recipes."""
    text = first_line(error)
    if "scripts are no longer supported" in text:
        return (
            "is built by a script, and hpcft runs no scripts of the hub; use a revision with plain "
            "files, for example task.data.revision: refs/convert/parquet"
        )
    return text.replace("BuilderConfig", "configuration")


def list_files(hub_input: HubInput) -> HubListing:
    """Lists commit and files of a hub input; downloads only lists and the index of the weights.

    Raises:
        DataError: it does not exist, may not be read, or is not of the kind that is needed.
        HubError: the hub does not respond.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    kind = "dataset" if hub_input.kind == "dataset" else "model"
    with translate_errors(hub_input):
        api = HfApi()
        commit = api.repo_info(hub_input.name, repo_type=kind, revision=hub_input.revision).sha
        assert commit is not None
        entries = api.list_repo_tree(
            hub_input.name, recursive=True, revision=commit, repo_type=kind
        )
        files = {
            entry.path: HubFile(entry.size, entry.lfs.sha256 if entry.lfs else entry.blob_id)
            for entry in entries
            if isinstance(entry, RepoFile)
        }
        if hub_input.kind == "dataset":
            return _list_data_set(hub_input, commit, files)
        wanted = _top_level_files(files, (*CONFIGS, *TOKENIZERS))
        if hub_input.kind == "model":
            wanted += _weight_files(hub_input, commit, files)
    return HubListing(commit, {name: files[name] for name in dict.fromkeys(wanted)})


def _top_level_files(files: dict[str, HubFile], patterns: tuple[str, ...]) -> list[str]:
    """Returns the matching files that are not in subfolders, which other libraries use."""
    names = [name for name in files if "/" not in name]
    return [name for name in names if any(fnmatch.fnmatch(name, p) for p in patterns)]


def _weight_files(hub_input: HubInput, commit: str, files: dict[str, HubFile]) -> list[str]:
    """Returns the files of the weights in safetensors: one file, or an index and its shards.

    Raises:
        DataError: there are none, or the index does not fit the files.
    """
    from huggingface_hub import hf_hub_download

    if "config.json" not in files:
        if "adapter_config.json" in files:
            what = "is an adapter, not a model: it has no config.json"
            fix = "set model.path to its base model, and method.adapter_path to a folder of it"
            raise DataError(f"{hub_input}: {what}; {fix}")
        raise DataError(f"{hub_input}: is not a model: it has no config.json; correct model.path")
    if WEIGHTS_INDEX in files:
        text = Path(hf_hub_download(hub_input.name, WEIGHTS_INDEX, revision=commit)).read_text(
            encoding="utf-8"
        )
        try:
            shards = sorted({str(name) for name in json.loads(text)["weight_map"].values()})
        except (ValueError, LookupError, AttributeError, TypeError):
            raise DataError(
                f"{hub_input}: {WEIGHTS_INDEX} is damaged on the hub; use another revision"
            ) from None
        if absent := [name for name in shards if name not in files]:
            raise DataError(
                f"{hub_input}: its index names {absent[0]}, which the hub does not have; "
                "use another revision"
            )
        return [WEIGHTS_INDEX, *shards]
    if WEIGHTS_FILE in files:
        return [WEIGHTS_FILE]
    pickled = _top_level_files(files, PICKLES)
    what = f"only pickled weights ({pickled[0]}), which can run code" if pickled else "no weights"
    fix = "use a revision with safetensors (model.revision), or, if you trust it, load it and "
    fix += "save_pretrained into a folder, and set model.path to that"
    raise DataError(f"{hub_input}: has {what}; {fix}")


def _list_data_set(hub_input: HubInput, commit: str, files: dict[str, HubFile]) -> HubListing:
    """Lists commit, files and splits of a data set.

    Raises:
        DataError: it reads files that are not in the repository.
    """
    import datasets

    builder = datasets.load_dataset_builder(hub_input.name, hub_input.config_name, revision=commit)
    by_split = builder.config.data_files
    prefix = f"hf://datasets/{hub_input.name}@{commit}/"
    data_files = {
        str(split): [url.removeprefix(prefix) for url in urls] for split, urls in by_split.items()
    }
    names = [name for files in data_files.values() for name in files]
    if elsewhere := [name for name in names if name not in files]:
        raise DataError(
            f"{hub_input}: reads {elsewhere[0]} from outside its repository, which hpcft does not "
            "download; use local files (task.data.files)"
        )
    wanted = [*_top_level_files(files, ("README.md", "*.json", "*.yaml")), *names]
    wanted = [name for name in dict.fromkeys(wanted) if name in files]
    return HubListing(commit, {name: files[name] for name in wanted}, data_files, builder)


def snapshot_folder(hub_input: HubInput, commit: str, cache: Path) -> Path:
    """Returns the folder of a commit's files in the cache."""
    return cache / hub_input.cache_folder_name / "snapshots" / commit


def missing_bytes(hub_input: HubInput, listing: HubListing, cache: Path) -> int:
    """Returns the size of the files that are not in the cache yet, in bytes."""
    blobs = cache / hub_input.cache_folder_name / "blobs"
    return sum(f.size_bytes for f in listing.files.values() if not (blobs / f.digest).exists())


def download(
    hub_input: HubInput,
    listing: HubListing,
    cache: Path,
    *,
    say: Callable[[str], None],
    bars: bool,
) -> None:
    """Downloads the files of a listing into the cache, without those that are there already.

    Args:
        hub_input: the input.
        listing: its commit and files.
        cache: folder of the Hugging Face cache.
        say: prints a line of progress.
        bars: whether to draw progress bars on stderr instead.

    Raises:
        DataError: the files may not be read, or are no longer there.
        HubError: the hub does not respond.
    """
    import glob

    from huggingface_hub import snapshot_download

    for partial in (cache / hub_input.cache_folder_name / "blobs").glob("*.incomplete"):
        with contextlib.suppress(OSError):  # another `hpcft stage` may remove it at the same time
            if time.time() - partial.stat().st_mtime > STALE_DOWNLOAD_S:
                partial.unlink()
    with translate_errors(hub_input):
        snapshot_download(
            hub_input.name,
            repo_type="dataset" if hub_input.kind == "dataset" else "model",
            revision=listing.commit,
            cache_dir=cache,
            allow_patterns=[glob.escape(name) for name in listing.files],
            tqdm_class=None if bars else _line_progress(say),
        )
    # Other programs find the commit of a branch or tag in the cache through this file.
    ref = cache / hub_input.cache_folder_name / "refs" / hub_input.revision
    if hub_input.revision != listing.commit:
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(listing.commit, encoding="utf-8")


def _line_progress(say: Callable[[str], None]) -> Any:
    """Returns a `tqdm` class that prints a line every few seconds instead of drawing a bar."""
    from huggingface_hub.utils.tqdm import tqdm

    class LineProgress(tqdm):
        """Prints how much has arrived."""

        printed_at = time.monotonic()

        def __init__(self, *arguments: Any, **named: Any) -> None:
            named["file"] = io.StringIO()  # the bar itself is drawn nowhere
            super().__init__(*arguments, **named)  # type: ignore[no-untyped-call]

        def display(self, *_: Any, **__: Any) -> None:
            due = time.monotonic() - LineProgress.printed_at > PROGRESS_EVERY_S
            if due and self.unit == "B" and self.total and self.n:
                LineProgress.printed_at = time.monotonic()
                say(f"  {format_bytes(int(self.n))} of {format_bytes(int(self.total))}")

    return LineProgress

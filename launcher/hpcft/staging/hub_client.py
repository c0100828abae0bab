"""The hub: which files a need stands for, what they weigh, fetching them, and its refusals."""

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

from hpcft.core.errors import DataError, HubError
from hpcft.core.units import format_bytes
from hpcft.staging.hub_inputs import HubInput

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CONFIGS = ("config.json", "generation_config.json")
TOKENIZERS = (
    "tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
    "*.model", "*.tiktoken", "chat_template.*",
)  # fmt: skip
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
SAY_EVERY_S = 10.0
STALE_S = 3600.0  # a download that has not grown for so long belongs to nobody


@dataclass(frozen=True)
class HubFile:
    """A file as the hub describes it."""

    size_bytes: int
    digest: str


@dataclass(frozen=True)
class HubListing:
    """What a need stands for on the hub at this moment."""

    commit: str
    files: dict[str, HubFile]
    splits: tuple[str, ...] = ()
    """Splits of a data set."""
    builder: Any = field(default=None, compare=False)
    """What prepares a data set (`datasets.DatasetBuilder`)."""

    @property
    def size_bytes(self) -> int:
        """Size of all files."""
        return sum(file.size_bytes for file in self.files.values())


@contextlib.contextmanager
def translate_errors(need: HubInput) -> Iterator[None]:
    """Turns what the Hugging Face libraries raise into a sentence with what to do.

    Raises:
        DataError: the name, the revision or the permission is wrong.
        HubError: the hub cannot be reached or did not answer.
    """
    import datasets
    import httpx2
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError:
        raise DataError(
            f"{need}: is gated; accept its terms on its page on the hub, then log in "
            "(`hf auth login`, or HF_TOKEN in the environment)"
        ) from None
    except errors.RepositoryNotFoundError:
        raise DataError(
            f"{need}: the hub has none of that name, or it is private; correct the name, or log in "
            "(`hf auth login`, or HF_TOKEN in the environment)"
        ) from None
    except errors.RevisionNotFoundError:
        fix = "name a branch, a tag or a whole commit"
        raise DataError(f"{need}: there is no revision {need.revision}; {fix}") from None
    except errors.OfflineModeIsEnabled:
        raise HubError(f"{need}: HF_HUB_OFFLINE is set; unset it to fetch") from None
    except (
        datasets.exceptions.DatasetNotFoundError,
        datasets.exceptions.DataFilesNotFoundError,
        datasets.data_files.EmptyDatasetError,
        ValueError,
        RuntimeError,
    ) as error:
        raise DataError(f"{need}: {_data_set_trouble(error)}") from None
    except (httpx2.HTTPError, ConnectionError, errors.LocalEntryNotFoundError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            raise DataError(f"{need}: the hub refuses access; log in (`hf auth login`)") from None
        what = f"answered {status}" if status else f"cannot be reached ({_first_line(error)})"
        fix = "run this where there is a network; what has been fetched is kept"
        raise HubError(f"{need}: {_endpoint()} {what}; {fix}") from None


def _endpoint() -> str:
    from huggingface_hub import constants

    return constants.ENDPOINT


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0].strip() or type(error).__name__


def _data_set_trouble(error: BaseException) -> str:
    text = _first_line(error)
    if "scripts are no longer supported" in text:
        return (
            "is made by a script of its own, which is never run; name a revision with plain "
            "files, for example task.data.revision: refs/convert/parquet"
        )
    return text.replace("BuilderConfig", "configuration")


def list_files(need: HubInput) -> HubListing:
    """What a need stands for now; reads no more than lists and small files.

    Raises:
        DataError: it is not there, may not be read, or is not what is needed.
        HubError: the hub does not answer.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    kind = "dataset" if need.kind == "dataset" else "model"
    with translate_errors(need):
        api = HfApi()
        commit = api.repo_info(need.name, repo_type=kind, revision=need.revision).sha
        assert commit is not None
        entries = api.list_repo_tree(need.name, recursive=True, revision=commit, repo_type=kind)
        files = {
            entry.path: HubFile(entry.size, entry.lfs.sha256 if entry.lfs else entry.blob_id)
            for entry in entries
            if isinstance(entry, RepoFile)
        }
        if need.kind == "dataset":
            return _data_set(need, commit, files)
        wanted = _matching(files, (*CONFIGS, *TOKENIZERS))
        if need.kind == "model":
            wanted += _weights(need, commit, files)
    return HubListing(commit, {name: files[name] for name in dict.fromkeys(wanted)})


def _matching(files: dict[str, HubFile], patterns: tuple[str, ...]) -> list[str]:
    """Files at the top of a repository; what lies deeper is for other libraries."""
    names = [name for name in files if "/" not in name]
    return [name for name in names if any(fnmatch.fnmatch(name, p) for p in patterns)]


def _weights(need: HubInput, commit: str, files: dict[str, HubFile]) -> list[str]:
    """The weights in safetensors: one file, or an index and its shards."""
    from huggingface_hub import hf_hub_download

    if "config.json" not in files:
        other = "an adapter, not a model" if "adapter_config.json" in files else "no model"
        raise DataError(f"{need}: has no config.json, so it is {other}")
    if INDEX in files:
        text = Path(hf_hub_download(need.name, INDEX, revision=commit)).read_text()
        try:
            shards = sorted({str(name) for name in json.loads(text)["weight_map"].values()})
        except (ValueError, LookupError, AttributeError, TypeError):
            raise DataError(f"{need}: {INDEX} is damaged on the hub") from None
        if absent := [name for name in shards if name not in files]:
            raise DataError(f"{need}: its index names {absent[0]}, which the hub does not have")
        return [INDEX, *shards]
    if SINGLE in files:
        return [SINGLE]
    pickled = _matching(files, PICKLES)
    what = f"only pickled weights ({pickled[0]}), which can run code" if pickled else "no weights"
    fix = "name a revision with safetensors (model.revision), or convert it: load it where you "
    fix += "trust it and save_pretrained into a folder"
    raise DataError(f"{need}: has {what}; {fix}")


def _data_set(need: HubInput, commit: str, files: dict[str, HubFile]) -> HubListing:
    import datasets

    builder = datasets.load_dataset_builder(need.name, need.config_name, revision=commit)
    by_split = builder.config.data_files
    prefix = f"hf://datasets/{need.name}@{commit}/"
    names = [name.removeprefix(prefix) for found in by_split.values() for name in found]
    if strange := [name for name in names if name not in files]:
        raise DataError(f"{need}: takes {strange[0]} from elsewhere, which is not fetched")
    wanted = [*_matching(files, ("README.md", "*.json", "*.yaml")), *names]
    wanted = [name for name in dict.fromkeys(wanted) if name in files]
    return HubListing(commit, {name: files[name] for name in wanted}, tuple(by_split), builder)


def snapshot_folder(need: HubInput, commit: str, hub: Path) -> Path:
    """Where the files of a commit lie in the cache."""
    return hub / need.repository / "snapshots" / commit


def lacking_bytes(need: HubInput, listing: HubListing, hub: Path) -> int:
    """What is still to be fetched."""
    blobs = hub / need.repository / "blobs"
    return sum(f.size_bytes for f in listing.files.values() if not (blobs / f.digest).exists())


def fetch(
    need: HubInput, listing: HubListing, hub: Path, say: Callable[[str], None], bars: bool
) -> None:
    """Fetches the files of a listing into the cache; those that are there already are kept.

    Raises:
        DataError, HubError: as `ask`.
    """
    import glob

    from huggingface_hub import snapshot_download

    for left in (hub / need.repository / "blobs").glob("*.incomplete"):
        with contextlib.suppress(OSError):  # another stage may take it away at the same time
            if time.time() - left.stat().st_mtime > STALE_S:
                left.unlink()
    with translate_errors(need):
        snapshot_download(
            need.name,
            repo_type="dataset" if need.kind == "dataset" else "model",
            revision=listing.commit,
            cache_dir=hub,
            allow_patterns=[glob.escape(name) for name in listing.files],
            tqdm_class=None if bars else _lines(say),
        )
    # So that a name without a commit is found in the cache too, by whatever else goes by it.
    ref = hub / need.repository / "refs" / need.revision
    if need.revision != listing.commit:
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(listing.commit)


def _lines(say: Callable[[str], None]) -> Any:
    """Progress as a line every few seconds, for where there is no terminal to draw on."""
    from huggingface_hub.utils.tqdm import tqdm

    class Lines(tqdm):
        """Says how much has arrived instead of drawing a bar."""

        said_at = time.monotonic()

        def __init__(self, *arguments: Any, **named: Any) -> None:
            # Draws, and ends its line, where nobody sees it.
            named["file"] = io.StringIO()
            super().__init__(*arguments, **named)  # type: ignore[no-untyped-call]

        def display(self, *_: Any, **__: Any) -> None:
            due = time.monotonic() - Lines.said_at > SAY_EVERY_S
            if due and self.unit == "B" and self.total and self.n:
                Lines.said_at = time.monotonic()
                say(f"  {format_bytes(int(self.n))} of {format_bytes(int(self.total))}")

    return Lines

"""Evidence to a named class, a sentence and a next step."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from hpcft.cluster.states import JobState
from hpcft.errors import StoreError
from hpcft.out_of_memory import line_of
from hpcft.paths import RunPaths
from hpcft.records import Attempt, Record
from hpcft.store import open_file, read

TAIL_BYTES = 40_000


class RankError(Record):
    """What a rank wrote about its own end."""

    rank: int
    """Global rank."""
    node: str
    """Node that it ran on."""
    at: float
    """Unix time in seconds."""
    kind: str
    """Class of the exception."""
    message: str
    """Its text."""
    job_id: str = ""
    """Attempt that it belonged to."""
    phase: str = ""
    """What the rank was doing, in the words of `Progress`."""
    failure: str = ""
    """Class of the failure, where the rank knew more than its text tells; else empty."""
    next_step: str = ""
    """What to do, where the rank knew it."""
    traceback: str = Field(default="")
    """For developers; shown by `hpcft logs`."""


@dataclass(frozen=True)
class Failure:
    """Why a run has no result."""

    name: str
    """Class, for example `gpu_oom`."""
    sentence: str
    """What happened, with the decisive line of evidence."""
    next_step: str
    """What to do."""

    def __str__(self) -> str:
        return f"{self.sentence}; {self.next_step}"


# A rank writes this into its error log when it starts again: what stands above is dealt with.
STARTS_AGAIN = "hpcft: the training starts again"

# Torch lists every process on the GPU. In a container it cannot tell which of them it is itself,
# and names itself by number too: others are there only if it names more than one.
_OTHERS = (
    r"(this process|Process \d+) has [^\n]*Process \d+ has|Process \d+ has [^\n]*this process has"
)

# Class, pattern in what a rank or Slurm said, what to do. The first that matches wins, so the
# narrower stand above the wider.
_CLASSES = (
    ("timeout", r"not requeued because: timed-out", "raise resources.time_min"),
    ("foreign_memory", _OTHERS,
     "other processes hold the GPU: go to another node, a smaller batch would not help"),
    ("gpu_oom", r"CUDA out of memory|OutOfMemoryError|CUBLAS_STATUS_ALLOC_FAILED",
     "lower train.per_device_train_batch_size or set train.gradient_checkpointing: true"),
    ("host_oom", r"oom[-_ ]?kill|Out Of Memory|OUT_OF_MEMORY|exceeded memory limit|MemoryError|"
     r"an't allocate memory|annot allocate memory|DataLoader worker .* killed by signal: Killed",
     "the node's memory was not enough: lower the ranks per node or offload less"),
    ("disk", r"No space left on device|Disk quota exceeded", "make room, then submit again"),
    ("bad_node", r"uncorrectable ECC|\bXid\b", "tell the site and submit again"),
    ("access", r"offline mode|GatedRepo|401 Client Error|LocalEntryNotFound|OfflineModeIsEnabled",
     "a model or data set is not in the local cache: fetch it on the login node first"),
    ("nan", r"loss is (nan|inf)|not finite", "lower train.learning_rate, or use bf16 or fp32"),
)  # fmt: skip

# What a rank says when a peer is gone: of use only where nothing tells why the peer went.
_FOLLOWED = (
    ("nccl", r"NCCL (error|WARN)|ProcessGroupNCCL.*timeout|Connection (closed|reset) by peer|"
     r"gloo.*[Tt]imed? ?out",
     "a rank or the network between nodes died: look at the other ranks' logs"),
    ("rank_died", r"(?m)^Died: ", "see hpcft logs --stderr"),
    ("interrupted", r"(?m)^KeyboardInterrupt",
     "it was cancelled, or ended because another rank had died: look at the other ranks' logs"),
)  # fmt: skip

_STATES = {
    "TIMEOUT": ("timeout", "the time limit was reached", "raise resources.time_min"),
    "OUT_OF_MEMORY": ("host_oom", "Slurm ended it for using more host memory than --mem",
                      "lower the ranks per node or offload less"),
    "CANCELLED": ("cancelled", "it was cancelled", "submit it again when wanted"),
    "NODE_FAIL": ("infrastructure", "its node failed", "submit it again"),
    "BOOT_FAIL": ("infrastructure", "its node did not boot", "submit it again"),
    "PREEMPTED": ("infrastructure", "it was preempted by another job", "submit it again"),
    "DEADLINE": ("timeout", "its deadline passed", "submit it again"),
}  # fmt: skip


def explain(paths: RunPaths, attempt: Attempt | None, state: JobState) -> Failure:
    """Why a run that ended has no result."""
    errors = rank_errors(paths)
    for error in errors:
        if error.failure:  # judged where it happened, with the plan at hand
            return Failure(error.failure, error.message, error.next_step)
    evidence = [_said(error) for error in errors]
    if attempt and attempt.job_id:
        evidence += _log_tails(Path(attempt.logs), attempt.job_id)
    cause = _first_match(_CLASSES, evidence)
    if cause:
        return cause
    own = [error for error in errors if not only_followed(error)]
    if own:
        where = f"rank {own[0].rank} on {own[0].node}"
        return Failure("user", f"{where}: {_first_line(own[0])}", "see hpcft logs")
    if state.state in _STATES:
        return Failure(*_STATES[state.state])
    consequence = _first_match(_FOLLOWED, evidence)
    if consequence:
        return consequence
    if state.reason:
        return Failure("unknown", state.reason, "see hpcft logs")
    code = f" (exit code {state.exit_code})" if state.exit_code else ""
    return Failure("rank_died", f"a rank ended without a word{code}", "see hpcft logs --stderr")


def only_followed(error: RankError) -> bool:
    """Whether a rank's error is just what one says whose peer is gone."""
    return _first_match(_FOLLOWED, [_said(error)]) is not None


def _said(error: RankError) -> str:
    return f"{error.kind}: {error.message}"


def _first_match(classes: Sequence[tuple[str, str, str]], evidence: list[str]) -> Failure | None:
    """The class of the first text that is evidence of any."""
    for text in evidence:
        for name, pattern, step in classes:
            match = re.search(pattern, text)
            if match:
                return Failure(name, line_of(text, match.start()), step)
    return None


def rank_errors(paths: RunPaths) -> list[RankError]:
    """What ranks wrote about their own end, the earliest first: the others only followed it."""
    found = []
    for file in paths.errors.glob("*.json") if paths.errors.is_dir() else ():
        try:
            found.append(read(file, RankError))
        except StoreError:
            continue
    return sorted(found, key=lambda error: error.at)


def _log_tails(logs: Path, job_id: str) -> list[str]:
    tails = []
    for file in sorted(logs.glob(f"{job_id}_*_log.err"))[:64]:
        with contextlib.suppress(OSError), open_file(file) as stream:  # no evidence, then
            stream.seek(max(0, os.fstat(stream.fileno()).st_size - TAIL_BYTES))
            tail = stream.read(TAIL_BYTES).decode(errors="replace")
            tails.append(tail.rpartition(STARTS_AGAIN)[2])
    return tails


def _first_line(error: RankError) -> str:
    line = (error.message.strip().splitlines() or [""])[0]
    plain = error.kind in ("DataError", "UsageError", "InputError", "HpcftError")
    return line[:300] if plain else f"{error.kind}: {line[:300]}"

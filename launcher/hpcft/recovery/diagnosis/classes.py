"""The classes of failures: what is evidence of each, what hpcft does, and what a person can do.

Data, read from the top down: the first class whose pattern a text matches wins, so the narrower
stand above the wider. `docs/failures.md` is made of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Policy = Literal["requeue", "exclude", "change", "stop"]

POLICIES: dict[Policy, str] = {
    "requeue": "starts again from the last checkpoint, as long as it comes further in between",
    "exclude": "starts again from the last checkpoint, away from the node",
    "change": "starts again with less memory, one rung down the ladder",
    "stop": "stops, until a person has it go on",
}


@dataclass(frozen=True)
class FailureClass:
    """A class of failures."""

    name: str
    """As tables show it."""
    means: str
    """What has happened, as a sentence; shown where no line tells more."""
    policy: Policy
    """What hpcft does about it."""
    next_step: str
    """What a person can do where the run has ended with it."""
    patterns: tuple[str, ...] = ()
    """What ranks, libraries or Slurm print; groups named `rank` and `node` say whose it is. A class
    without any is judged by a rank itself, by figures, or by Slurm's state."""
    states: tuple[str, ...] = ()
    """Slurm's words for the end of a job."""


RESUME = "hpcft resume goes on from its last checkpoint"
SEE_LOGS = "see hpcft logs --stderr"
LESS_MEMORY = (
    "lower train.per_device_train_batch_size or set train.gradient_checkpointing: true; "
    "hpcft plan --all lists layouts that hold less"
)
_TASK = r"srun: error: (?P<node>\S{1,255}): tasks? (?P<rank>\d{1,6})\S*: "

# With several daemons on a machine each names its node.
_STEPD = r"slurmstepd(?:-(?P<node>\S{1,255}))?: error: "


def _raised(*words: str) -> str:
    """A pattern of an uncaught exception whose text has these words before anything quoted.

    What is quoted may be data, or a recipe's text, and is no evidence of anything.
    """
    return rf"(?m)^(?:\[rank\d+\]: ?)?[\w.]*(?:Error|Exception): [^\n'\"]*?(?:{'|'.join(words)})"


CAUSES = (
    FailureClass(
        "module", "a line of the profile's setup failed", "stop",
        "correct `setup` or `python` in the profile, and try the line on a compute node",
        (r"execve\(\): [^\n]{1,500}: (No such file or directory|Permission denied)",
         r"(?m)^ModuleNotFoundError: No module named '(submitit|hpcft)'"),
    ),
    FailureClass(
        "gpu_oom", "the memory of a GPU was not enough", "change", LESS_MEMORY,
        (r"(?m)^(\[rank\d+\]: ?)?[\w.]*OutOfMemoryError\b",
         _raised("CUDA out of memory", "CUDA error: out of memory",
                 "CU(BLAS|DNN)_STATUS_ALLOC_FAILED"),
         r"(?m)^Cuda failure (\d+ )?'out of memory'"),
    ),
    FailureClass(
        "fragmentation", "the memory of a GPU was free in pieces too small to use", "change",
        "set environment: { PYTORCH_CUDA_ALLOC_CONF: expandable_segments:True } in the profile",
    ),
    FailureClass(
        "foreign_memory", "other processes hold the GPU", "exclude",
        "go to another node, or plan with --other-processes: a smaller batch would not help",
    ),
    FailureClass(
        "host_oom", "it used more host memory than the job had", "change",
        "lower the ranks per node or offload less",
        (r"Detected \d+ oom[-_]kill event", rf"{_TASK}Out Of Memory",
         r"(?m)^Out of memory: Killed process", r"(?m)^Killed: [^\n]*\(oom_kill\)",
         rf"{_STEPD}[^\n]{{0,200}}[Ee]xceeded [^\n]{{0,50}}memory limit",
         r"(?m)^(\[rank\d+\]: ?)?[\w.]*MemoryError\b",
         _raised(r"[Cc]an(no|')t allocate memory", "std::bad_alloc",
                 r"DataLoader worker \(pid[^)]*\) is killed by signal: Killed")),
        ("OUT_OF_MEMORY",),
    ),
    FailureClass(
        "out_of_memory", "memory ran out on the last rung of the ladder", "stop",
        "take GPUs or nodes with more memory, or a method that trains less (lora, qlora)",
    ),
    FailureClass(
        "disk", "there is no room left to write to", "stop",
        "make room (files count as well as bytes), then hpcft resume goes on from its last "
        "checkpoint",
        (_raised("No space left on device", "Disk quota exceeded",
                 # What torch.save says of a full file system.
                 "PytorchStreamWriter failed writing file"),
         r"(?m)^[^\n'\"]{0,500}(No space left on device|Disk quota exceeded)$"),
    ),
    FailureClass(
        "file_system", "a file system did not answer", "requeue", RESUME,
        (_raised("Stale file handle", "Input/output error", "Read-only file system",
                 "Transport endpoint is not connected",
                 "Cannot send after transport endpoint shutdown"),),
    ),
    FailureClass(
        # Which Xid are the hardware's: docs.nvidia.com/deploy/xid-errors (13, 31 and 43 are the
        # program's own).
        "bad_node", "the hardware of a node is at fault", "exclude", "tell the site which node",
        (_raised("uncorrectable ECC error", "CUDA error: system not yet initialized",
                 r"CUDA-capable device\(s\) is/are busy or unavailable",
                 "Driver/library version mismatch"),
         r"NVRM: Xid \([^)]*\): (48|63|64|74|79|92|94|95|119|120|140)\b",
         r"NVRM: [^\n]*GPU has fallen off the bus"),
    ),
    FailureClass(
        "access", "a model or data set is not in the local cache, or not for you", "stop",
        "hpcft stage fetches it on the login node (a gated one asks for a token there)",
        (r"(?m)^[\w.]*(GatedRepo|LocalEntryNotFound|OfflineModeIsEnabled)(Error)?: ",
         _raised("40[13] Client Error", r"We couldn't connect to 'https?://[^']*' to load",
                 "outgoing traffic has been disabled",
                 "; stage it again, on a file system that")),
    ),
    FailureClass(
        "nan", "the loss is not a number", "stop",
        "lower train.learning_rate, clip gradients (train.max_grad_norm), or use bf16 or fp32",
        (r"(?m)^FloatingPointError: the loss ",
         _raised("Current loss scale already at minimum")),
    ),
    FailureClass(
        "port", "the port of rank 0 was taken", "requeue", RESUME,
        (_raised("EADDRINUSE", "[Aa]ddress already in use"),),
    ),
    FailureClass(
        "stale_build_lock", "a lock in the folder of DeepSpeed's compiled operators was held",
        "stop", "end the process that holds it, then submit it again",
        (r"the build lock of a DeepSpeed operator is still held",),
    ),
)  # fmt: skip

# What ends all ranks from outside: of use only where none of them had failed before.
FROM_OUTSIDE = (
    FailureClass(
        "timeout", "the time limit was reached", "requeue",
        f"raise resources.time_min, or {RESUME}",
        (r"CANCELLED AT \S+ DUE TO TIME LIMIT", r"not requeued because: timed-out"),
        ("TIMEOUT", "DEADLINE"),
    ),
    FailureClass(
        "preempted", "a job of higher priority took its place", "requeue", RESUME,
        (r"CANCELLED AT \S+ DUE TO PREEMPTION",), ("PREEMPTED",),
    ),
    FailureClass(
        "node_failed", "a node failed", "requeue", RESUME,
        (r"CANCELLED AT \S+ DUE TO NODE FAILURE",
         r"srun: error: Node failure on (?P<node>\S{1,255})"),
        ("NODE_FAIL", "BOOT_FAIL", "LAUNCH_FAILED", "RECONFIG_FAIL"),
    ),
    FailureClass("cancelled", "it was cancelled", "stop", f"{RESUME} when wanted",
                 states=("CANCELLED", "REVOKED")),
)  # fmt: skip

# What a rank says when a peer is gone: of use only where nothing tells why the peer went.
CONSEQUENCES = (
    FailureClass(
        "rank_died", "a rank ended without a word", "requeue", f"{SEE_LOGS}, or {RESUME}",
        (r"(?m)^Died: ",
         rf"{_TASK}(Killed|Segmentation fault|Aborted|Bus error|Illegal instruction)"),
    ),
    FailureClass(
        "nccl", "a rank or the network between nodes was gone", "requeue",
        f"look at the other ranks' logs, or {RESUME}",
        (r"ProcessGroupNCCL\.cpp:\d+\][^\n]{0,400}(timeout|exception)",
         r"(?m)^(\[rank\d+\]: ?)?[\w.]*Dist(Backend|Network|Store)Error: ",
         _raised("NCCL error", r"Connection (closed|reset) by peer", "Connection refused",
                 "No route to host", r"Timed out waiting \d+ms for")),
    ),
    FailureClass(
        "interrupted", "it was told to end", "stop", f"see the other ranks' logs, or {RESUME}",
        (r"(?m)^KeyboardInterrupt\b",),
    ),
)  # fmt: skip

# The last words before the end, where there is nothing else.
LAST_WORDS = (
    FailureClass(
        "user", "the program raised an error", "stop", SEE_LOGS,
        (r"(?m)^(?:\[rank\d+\]: ?)?[\w.]*(?:Error|Exception)\b(?:: [^\n]*)?$",
         r"(?m)^[^\n]{1,500}: command not found$"),
    ),
    FailureClass(
        "rank_died", "a rank ended without a word", "requeue", f"{SEE_LOGS}, or {RESUME}",
        (rf"{_TASK}(Exited with exit code \d+|Terminated)",),
    ),
)  # fmt: skip

# Told by states, or by what was tried before.
OTHERS = (
    FailureClass("stuck", "it came no further", "requeue",
                 f"see stacks/ in the run's folder for what each rank was doing, or {RESUME}"),
    FailureClass("requeue_held", "Slurm could not start it again, and holds it", "stop",
                 "scontrol release lets it start; if it is held again, ask the site",
                 states=("REQUEUE_HOLD", "SPECIAL_EXIT")),
    FailureClass("not_submitted", "it never became a job", "stop", "submit it again"),
    FailureClass("unknown", "nobody can say", "stop", SEE_LOGS),
)  # fmt: skip

KNOWN = {row.name: row for row in (*LAST_WORDS, *CAUSES, *FROM_OUTSIDE, *CONSEQUENCES, *OTHERS)}
BY_STATE = {state: row for row in KNOWN.values() for state in row.states}

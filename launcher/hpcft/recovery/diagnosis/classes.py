"""Failure classes: the evidence of each, what hpcft does about it, and what a person can do.

The classes are data, tried from the top down: the first class whose pattern matches a text wins, so
narrow patterns stand above wide ones. `make docs` writes the table of failures from them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Policy = Literal["requeue", "exclude", "change", "stop"]

POLICIES: dict[Policy, str] = {
    "requeue": "restarts from the last checkpoint, as long as it makes progress between restarts",
    "exclude": "restarts from the last checkpoint, on other nodes",
    "change": "restarts with the next fallback, which takes less memory",
    "stop": "stops until a person resumes it",
}


@dataclass(frozen=True)
class FailureClass:
    """A class of failures."""

    name: str
    """Name that tables show."""
    means: str
    """Sentence that says what happened; shown if no line of a log says more."""
    policy: Policy
    """Action that hpcft takes by itself."""
    next_step: str
    """Advice for a person whose run ended with this failure."""
    patterns: tuple[str, ...] = ()
    """Regular expressions for what ranks, libraries or Slurm print; their groups `rank` and `node`
    say where. A class without patterns is reported by a rank itself, or by Slurm's state."""
    states: tuple[str, ...] = ()
    """States of a job in which Slurm reports this failure."""


RESUME = "hpcft resume RUN continues from the last checkpoint"
SEE_LOGS = "see hpcft logs RUN --stderr"
LESS_MEMORY = (
    "lower train.per_device_train_batch_size or set train.gradient_checkpointing: true; "
    "hpcft plan --all lists the layouts that take less memory"
)
_TASK = r"srun: error: (?P<node>\S{1,255}): tasks? (?P<rank>\d{1,6})\S*: "

# If several daemons run on one machine, each adds its node to its name.
_STEPD = r"slurmstepd(?:-(?P<node>\S{1,255}))?: error: "


def _raised(*words: str) -> str:
    """Returns a pattern for an uncaught exception whose text has one of these words.

    The words have to come before anything quoted: quoted text may be data, and is no evidence.
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
        "gpu_oom", "a GPU ran out of memory", "change", LESS_MEMORY,
        (r"(?m)^(\[rank\d+\]: ?)?[\w.]*OutOfMemoryError\b",
         _raised("CUDA out of memory", "CUDA error: out of memory",
                 "CU(BLAS|DNN)_STATUS_ALLOC_FAILED"),
         r"(?m)^Cuda failure (\d+ )?'out of memory'"),
    ),
    FailureClass(
        "fragmentation", "GPU memory was free only in pieces too small to use", "change",
        "set environment: { PYTORCH_CUDA_ALLOC_CONF: expandable_segments:True } in the profile",
    ),
    FailureClass(
        "foreign_memory", "other processes hold the memory of the GPU", "exclude",
        "use another node, or plan with --other-processes; a smaller batch would not help",
    ),
    FailureClass(
        "host_oom", "the job used more host memory than it had requested", "change",
        "lower resources.gpus_per_node, or offload less",
        (r"Detected \d+ oom[-_]kill event", rf"{_TASK}Out Of Memory",
         r"(?m)^Out of memory: Killed process", r"(?m)^Killed: [^\n]*\(oom_kill\)",
         rf"{_STEPD}[^\n]{{0,200}}[Ee]xceeded [^\n]{{0,50}}memory limit",
         r"(?m)^(\[rank\d+\]: ?)?[\w.]*MemoryError\b",
         _raised(r"[Cc]an(no|')t allocate memory", "std::bad_alloc",
                 r"DataLoader worker \(pid[^)]*\) is killed by signal: Killed")),
        ("OUT_OF_MEMORY",),
    ),
    FailureClass(
        "out_of_memory", "memory ran out and no fallback is left", "stop",
        "take GPUs or nodes with more memory, or a method that trains less (lora, qlora)",
    ),
    FailureClass(
        "disk", "the file system has no room left", "stop",
        f"make room (the number of files may be limited too); then {RESUME}",
        (_raised("No space left on device", "Disk quota exceeded",
                 # torch.save prints this if the file system is full.
                 "PytorchStreamWriter failed writing file"),
         r"(?m)^[^\n'\"]{0,500}(No space left on device|Disk quota exceeded)$"),
    ),
    FailureClass(
        "file_system", "a file system did not respond", "requeue", RESUME,
        (_raised("Stale file handle", "Input/output error", "Read-only file system",
                 "Transport endpoint is not connected",
                 "Cannot send after transport endpoint shutdown"),),
    ),
    FailureClass(
        # These Xid are hardware faults (13, 31 and 43 are errors of the program):
        # docs.nvidia.com/deploy/xid-errors
        "bad_node", "the hardware of a node failed", "exclude", "report the node to the site",
        (_raised("uncorrectable ECC error", "CUDA error: system not yet initialized",
                 r"CUDA-capable device\(s\) is/are busy or unavailable",
                 "Driver/library version mismatch"),
         r"NVRM: Xid \([^)]*\): (48|63|64|74|79|92|94|95|119|120|140)\b",
         r"NVRM: [^\n]*GPU has fallen off the bus"),
    ),
    FailureClass(
        "access", "a model or data set is not in the local cache, or may not be read", "stop",
        "run hpcft stage on the login node (a gated repository needs a token there)",
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
        "port", "the port of rank 0 was in use", "requeue", RESUME,
        (_raised("EADDRINUSE", "[Aa]ddress already in use"),),
    ),
    FailureClass(
        "stale_build_lock", "another process holds the build lock of a DeepSpeed operator",
        "stop", "end the process that holds the lock, then submit the run again",
        (r"the build lock of a DeepSpeed operator is still held",),
    ),
)  # fmt: skip

# Ends of all ranks from outside. They count only if no rank had failed before.
FROM_OUTSIDE = (
    FailureClass(
        "timeout", "the time limit was reached", "requeue",
        f"raise resources.time_min, or {RESUME}",
        (r"CANCELLED AT \S+ DUE TO TIME LIMIT", r"not requeued because: timed-out"),
        ("TIMEOUT", "DEADLINE"),
    ),
    FailureClass(
        "preempted", "a job of higher priority preempted the run", "requeue", RESUME,
        (r"CANCELLED AT \S+ DUE TO PREEMPTION",), ("PREEMPTED",),
    ),
    FailureClass(
        "node_failed", "a node failed", "requeue", RESUME,
        (r"CANCELLED AT \S+ DUE TO NODE FAILURE",
         r"srun: error: Node failure on (?P<node>\S{1,255})"),
        ("NODE_FAIL", "BOOT_FAIL", "LAUNCH_FAILED", "RECONFIG_FAIL"),
    ),
    FailureClass("cancelled", "the job was cancelled", "stop", RESUME,
                 states=("CANCELLED", "REVOKED")),
)  # fmt: skip

# Errors of a rank whose peer is gone. They count only if nothing says why the peer ended.
CONSEQUENCES = (
    FailureClass(
        "rank_died", "a rank ended without an error message", "requeue", f"{SEE_LOGS}, or {RESUME}",
        (r"(?m)^Died: ",
         rf"{_TASK}(Killed|Segmentation fault|Aborted|Bus error|Illegal instruction)"),
    ),
    FailureClass(
        "nccl", "a rank, or the network between nodes, was lost", "requeue",
        f"see the other ranks' logs (hpcft logs RUN --rank N), or {RESUME}",
        (r"ProcessGroupNCCL\.cpp:\d+\][^\n]{0,400}(timeout|exception)",
         r"(?m)^(\[rank\d+\]: ?)?[\w.]*Dist(Backend|Network|Store)Error: ",
         _raised("NCCL error", r"Connection (closed|reset) by peer", "Connection refused",
                 "No route to host", r"Timed out waiting \d+ms for")),
    ),
    FailureClass(
        "interrupted", "a signal stopped the run", "stop",
        f"see the other ranks' logs (hpcft logs RUN --rank N), or {RESUME}",
        (r"(?m)^KeyboardInterrupt\b",),
    ),
)  # fmt: skip

# Last lines before the end, for runs without other evidence.
LAST_WORDS = (
    FailureClass(
        "user", "the program raised an error", "stop", SEE_LOGS,
        (r"(?m)^(?:\[rank\d+\]: ?)?[\w.]*(?:Error|Exception)\b(?:: [^\n]*)?$",
         r"(?m)^[^\n]{1,500}: command not found$"),
    ),
    FailureClass(
        "rank_died", "a rank ended without an error message", "requeue", f"{SEE_LOGS}, or {RESUME}",
        (rf"{_TASK}(Exited with exit code \d+|Terminated)",),
    ),
)  # fmt: skip

# Failures known from states, or from the restarts that were tried.
OTHERS = (
    FailureClass("stuck", "the run made no progress", "requeue",
                 "see hpcft logs RUN, and stacks/ in the run's folder for what each rank was "
                 f"doing; {RESUME}"),
    FailureClass("requeue_held", "Slurm could not restart the job, and holds it", "stop",
                 "scontrol release lets the job start; if it is held again, ask the site",
                 states=("REQUEUE_HOLD", "SPECIAL_EXIT")),
    FailureClass("not_submitted", "the run never became a job", "stop", "submit the run again"),
    FailureClass("unknown", "the cause is not known", "stop", SEE_LOGS),
)  # fmt: skip

KNOWN = {row.name: row for row in (*LAST_WORDS, *CAUSES, *FROM_OUTSIDE, *CONSEQUENCES, *OTHERS)}
BY_STATE = {state: row for row in KNOWN.values() for state in row.states}

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


_LINE = r"(?m)^(?:\[rank\d+\]: ?)?"  # torch may put the rank before each line of a traceback.


def _raised(*words: str) -> str:
    """Returns a pattern for an uncaught exception whose text has one of these words.

    The words have to come before anything quoted: quoted text may be data, and is no evidence.
    Exceptions of Python, of C++ and of NCCL's watchdog thread are printed in three ways.
    """
    kinds = (
        r"[\w.]*(?:Error|Exception): |[ \t]{1,9}what\(\):[ \t]{1,9}"
        r"|[^\n'\"]{0,300}thread terminated with exception: "
    )
    return rf"{_LINE}(?:{kinds})[^\n'\"]*?(?:{'|'.join(words)})"


CAUSES = (
    FailureClass(
        "module", "a line of the profile's setup failed", "stop",
        "correct `setup` or `python` in the profile, and try the line on a compute node",
        (r"execve\(\): [^\n]{1,500}: "
         r"(No such file or directory|Permission denied|Exec format error)",
         r"(?m)^ModuleNotFoundError: No module named '(submitit|hpcft)'"),
    ),
    FailureClass(
        "gpu_oom", "a GPU ran out of memory", "change", LESS_MEMORY,
        (rf"{_LINE}[\w.]*OutOfMemoryError\b",
         _raised("CUDA out of memory", "CUDA error: out of memory",
                 "CU(BLAS|DNN)_STATUS_ALLOC_FAILED"),
         rf"{_LINE}Cuda failure (\d+ )?'out of memory'"),
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
         r"(?m)^(\[[ \d.]{1,20}\] |[^\n'\"]{0,80} kernel: )?"
         r"(Memory cgroup out|Out) of memory: Kill(ed)? process",
         r"(?m)^Killed: [^\n]*\(oom_kill\)",
         r"(?m)^[^\n'\"]{0,200}\bfork: (retry: )?Cannot allocate memory",
         rf"{_STEPD}[^\n]{{0,200}}[Ee]xceeded [^\n]{{0,50}}memory limit",
         rf"{_LINE}[\w.]*MemoryError\b",
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
                 # torch.save raises these if the file system is full: at a write, and at the end.
                 "PytorchStreamWriter failed writing file", "basic_ios::clear: iostream error",
                 r"\[enforce fail at inline_container\.cc:\d+\] \. unexpected pos",
                 r"IoError\(Os \{ code: (?:28|122)\b",  # safetensors
                 # /dev/shm is full, through which data workers pass their batches.
                 r"DataLoader worker \(pid[^)]*\) is killed by signal: Bus error"),
         r"(?m)^[^\n'\"]{0,500}(No space left on device|Disk quota exceeded)$"),
    ),
    FailureClass(
        "file_system", "a file system did not respond", "requeue", RESUME,
        (_raised("Stale file handle", "Input/output error", "Read-only file system",
                 "Transport endpoint is not connected", "No locks available", "Remote I/O error",
                 "Cannot send after transport endpoint shutdown"),),
    ),
    FailureClass(
        # These Xid are hardware faults (13, 31 and 43 are errors of the program):
        # docs.nvidia.com/deploy/xid-errors
        "bad_node", "the hardware of a node failed", "exclude", "report the node to the site",
        (_raised("uncorrectable ECC error", "system not yet initialized",
                 r"CUDA-capable device(?:\(s\) is/|s )are busy or unavailable",
                 "no CUDA-capable device is detected", "No CUDA GPUs are available",
                 "CUDA error: invalid device ordinal", "CUDA (?:error: )?unknown error",
                 "GPU is lost", "Driver/library version mismatch"),
         rf"{_LINE}Cuda failure (\d+ )?'(uncorrectable ECC|system not yet initialized|no CUDA)",
         r"(?m)^Unable to determine the device handle for ",
         r"NVRM: Xid \([^)]*\): (48|63|64|74|79|92|94|95|119|120|140)\b",
         r"NVRM: [^\n]*GPU has fallen off the bus"),
    ),
    FailureClass(
        "access", "a model or data set is not in the local cache, or may not be read", "stop",
        "run hpcft stage on the login node (a gated repository needs a token there)",
        (r"(?m)^[\w.]*(GatedRepo|LocalEntryNotFound|OfflineModeIsEnabled)(Error)?: ",
         rf"{_LINE}(requests|urllib3|httpx|httpcore)\.[\w.]{{1,99}}: ",
         _raised("40[134] Client Error", r"We couldn't connect to 'https?://[^']*' to load",
                 "outgoing traffic has been disabled", "Couldn't reach",
                 "is not a valid model identifier", r"Can't load [\w ]{1,30} for ",
                 "Error no file named", "Error while deserializing header",
                 "; stage it again, on a file system that")),
    ),
    FailureClass(
        "nan", "the loss is not a number", "stop",
        "lower train.learning_rate, clip gradients (train.max_grad_norm), or use bf16 or fp32",
        (r"(?m)^FloatingPointError: the loss ",
         rf"{_LINE}RuntimeError: Function '\w{{1,99}}' returned nan values",
         _raised("Current loss scale already at minimum", "probability tensor contains either")),
    ),
    FailureClass(
        "device_assert", "an index is out of range on the GPU: a token, a label or a position",
        "stop", "compare the tokenizer's and the labels' largest id with the model's tables; "
        "environment: { CUDA_LAUNCH_BLOCKING: \"1\" } in the profile shows the line",
        (_raised("CUDA error: device-side assert triggered"),),
    ),
    FailureClass(
        "permission", "a file may not be read or written from the compute node", "stop",
        "look at its owner and mode (ls -l), on a compute node too; then " + RESUME,
        (_raised("Permission denied", "Operation not permitted"),),
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
    FailureClass(
        "environment", "a package, a library or the driver is missing or of another version",
        "stop", "correct `setup`, `python` or the installed packages (docs/guides/install.md), and "
        "try the import on a compute node",
        (rf"{_LINE}(ImportError|ModuleNotFoundError): ",
         _raised("NVIDIA driver on your system is too old", "no kernel image is available",
                 "CUDA driver version is insufficient", "cannot open shared object file",
                 "undefined symbol: ", "CUDA_HOME does not exist", "Error building extension",
                 r"[\w: >-]{0,60}Installed CUDA version [\d.]{1,9} does not match",
                 # The tokenizer's file is newer than the installed `tokenizers`.
                 "data did not match any variant of untagged enum")),
    ),
    FailureClass(
        "launch", "Slurm could not start the ranks as asked", "stop",
        "correct srun_args, environment or resources in the profile; what srun prints says which",
        (r"(?m)^srun: fatal: ", r"(?m)^srun: (unrecognized|invalid) option ",
         # The others of these pass by themselves, for example if the controller is away.
         r"(?m)^srun: error: Unable to create step for job \d+: (More|Memory|Requested|Invalid g)",
         r"(?m)^srun: error: [^\n]{0,200}(Unable to satisfy cpu bind request|CPU binding outside)",
         rf"{_STEPD}(pyxis: (child|failed)|spank: required plugin)"),
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
         r"srun: error: Node failure on (?P<node>\S{1,255})",
         r"srun: error: Task launch for \S{1,50} failed on node (?P<node>\S{1,255}): "),
        ("NODE_FAIL", "BOOT_FAIL", "LAUNCH_FAILED", "RECONFIG_FAIL"),
    ),
    FailureClass("cancelled", "the job was cancelled", "stop", RESUME,
                 states=("CANCELLED", "REVOKED")),
)  # fmt: skip

# Errors of a rank whose peer is gone. They count only if nothing says why the peer ended.
CONSEQUENCES = (
    FailureClass(
        "rank_died", "a rank ended without an error message", "requeue", f"{SEE_LOGS}, or {RESUME}",
        (r"(?m)^Died: ", r"(?m)^Fatal Python error: (?!Aborted)",
         r"(?m)^(double free or corruption|free\(\): |malloc\(\): |corrupted size vs)",
         r"(?m)^\S{1,500}: line \d+: +\d+ (Killed|Segmentation fault|Bus error|Illegal instr)",
         _raised(r"DataLoader worker \(pid[^\n]{1,99}\) (?:exited unexpectedly|is killed by)"),
         rf"{_TASK}(Killed|Segmentation fault|Bus error|Illegal instruction)"),
    ),
    FailureClass(
        "nccl", "a rank, or the network between nodes, was lost", "requeue",
        f"see the other ranks' logs (hpcft logs RUN --rank N), or {RESUME}",
        (r"ProcessGroupNCCL\.cpp:\d+\][^\n]{0,400}(timeout|timed out|exception)",
         rf"{_LINE}[\w.]*Dist(Backend|Network|Store)Error: ",
         _raised("NCCL error", r"Connection (closed|reset) by peer", "Connection refused",
                 "Connection timed out", "No route to host", "Socket Timeout",
                 "connectFullMesh failed", r"Timed out waiting \d+ms for")),
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
        (rf"{_LINE}[\w.]*(?:Error|Exception)\b(?:: [^\n]*)?$",
         r"(?m)^[^\n]{1,500}: command not found$"),
    ),
    FailureClass(
        "rank_died", "a rank ended without an error message", "requeue", f"{SEE_LOGS}, or {RESUME}",
        # Many libraries abort the process after an error, which says more.
        (rf"{_TASK}(Aborted|Exited with exit code \d+|Terminated)",),
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
    FailureClass("not_requeued", "Slurm did not take the run again", "stop", RESUME),
    FailureClass("not_submitted", "the run never became a job", "stop", "submit the run again"),
    FailureClass("unknown", "the cause is not known", "stop", SEE_LOGS),
)  # fmt: skip

KNOWN = {row.name: row for row in (*LAST_WORDS, *CAUSES, *FROM_OUTSIDE, *CONSEQUENCES, *OTHERS)}
BY_STATE = {state: row for row in KNOWN.values() for state in row.states}

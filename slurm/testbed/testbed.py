"""Starts, stops and shows a real Slurm cluster on this machine, in one folder.

python slurm/testbed/testbed.py start|stop|status|env
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from testbed_cluster import Testbed
from testbed_daemons import MissingProgramsError
from testbed_folder import Shape, TestbedError

__all__ = ["MissingProgramsError", "Testbed", "TestbedError", "main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    options = _parser().parse_args(arguments)
    try:
        testbed = Testbed(
            options.dir,
            nodes=options.nodes,
            gpus=options.gpus,
            cpus=options.cpus,
            memory_mb=options.memory_mb,
            accounting=options.accounting,
            progress=_say,
        )
    except TestbedError as error:
        _say(str(error))
        return 2
    commands = {"start": _start, "stop": _stop, "status": _status, "env": _env}
    try:
        return commands[options.command](testbed)
    except MissingProgramsError as error:
        _say(str(error))
        return 3
    except (TestbedError, OSError) as error:
        _say(str(error))
        return 1
    except KeyboardInterrupt:
        _say("interrupted")
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="testbed.py",
        description="Start and stop a real Slurm cluster on this machine, for tests.",
        epilog="exit codes: 0 fine, 1 failed or not running, 2 usage, 3 programs missing",
    )
    parser.add_argument("command", choices=["start", "stop", "status", "env"])
    parser.add_argument(
        "--dir",
        type=Path,
        help="the cluster's folder (default: hpcft-testbed-UID in $XDG_RUNTIME_DIR or /tmp)",
    )
    shape = parser.add_argument_group("start: size of the cluster")
    for name, meaning in (
        ("nodes", "nodes"),
        ("gpus", "fake GPUs of each node"),
        ("cpus", "CPUs that each node claims"),
        ("memory-mb", "memory in MB that each node claims"),
    ):
        default = getattr(Shape, name.replace("-", "_"))
        shape.add_argument(
            f"--{name}", type=int, default=default, metavar="N", help=f"{meaning} ({default})"
        )
    shape.add_argument(
        "--no-accounting",
        dest="accounting",
        action="store_false",
        help="start no slurmdbd and no database: faster, but without sacct and accounts",
    )
    return parser


def _start(testbed: Testbed) -> int:
    requested = testbed.requested
    testbed.start()
    if testbed.shape != requested:
        _say(f"the cluster runs with {testbed.shape}; to change that, stop it first")
    _say("to use the cluster, enter the following; to end it: testbed.py stop")
    return _env(testbed)


def _stop(testbed: Testbed) -> int:
    testbed.stop()
    return 0


def _status(testbed: Testbed) -> int:
    states = testbed.daemons()
    for name, alive in states.items():
        print(name, "running" if alive else "stopped", sep="\t")
    if states.get("slurmctld"):
        for name, state in testbed.node_states().items():
            print(name, state, sep="\t")
    if not any(states.values()):
        _say(f"no cluster runs in {testbed.layout.root}")
    return 0 if states and all(states.values()) else 1


def _env(testbed: Testbed) -> int:
    if not testbed.running:
        _say(f"no cluster runs in {testbed.layout.root}; start one with: testbed.py start")
        return 1
    for name, value in testbed.env.items():
        print(f"export {name}={shlex.quote(value)}")
    return 0


def _say(line: str) -> None:
    print(f"testbed: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())

"""Testbed: starts and stops a cluster's daemons in order, and disturbs them for tests."""

from __future__ import annotations

import contextlib
import functools
import getpass
import os
import secrets
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

import testbed_config as config
import testbed_daemons as daemons
import testbed_folder as folder
from testbed_folder import Layout, Shape, TestbedError
from testbed_record import Record, Supervisor


class Testbed:
    """A Slurm cluster whose keys, sockets, state, database and logs are in one folder.

    As a context manager it starts the cluster and stops it again. The daemons outlive the process
    that started them; another `Testbed` on the same folder finds them.
    """

    __test__ = False  # pytest would take the name for a test class.

    def __init__(
        self,
        directory: str | os.PathLike[str] | None = None,
        nodes: int = Shape.nodes,
        gpus: int = Shape.gpus,
        cpus: int = Shape.cpus,
        memory_mb: int = Shape.memory_mb,
        accounting: bool = Shape.accounting,
        progress: Callable[[str], None] | None = None,
    ) -> None:
        """Describes a cluster; `start` starts it.

        Args:
            directory: folder of the cluster, by default one per user.
            nodes: number of nodes, which are named `n1`, `n2` and so on.
            gpus: fake GPUs on each node.
            cpus: CPUs that each node claims.
            memory_mb: memory in MB that each node claims.
            accounting: whether slurmdbd and its database run.
            progress: receives a line for each step.

        Raises:
            TestbedError: a number is out of bounds, or the folder cannot hold a cluster.
        """
        root = Path(directory) if directory is not None else folder.default_folder()
        self.layout = Layout(root.absolute().resolve())
        self.requested = Shape(nodes, gpus, cpus, memory_mb, accounting)
        self._say = progress or (lambda line: None)
        if problem := self.requested.problem() or folder.folder_problem(self.layout.root):
            raise TestbedError(problem)
        self._daemons = Supervisor(self.layout)

    def __enter__(self) -> Testbed:
        """Starts the cluster."""
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stops the cluster."""
        self.stop()

    @property
    def env(self) -> dict[str, str]:
        """Variables with which Slurm's clients find this cluster."""
        return self._daemons.env

    @property
    def running(self) -> bool:
        """Whether any of the cluster's daemons runs."""
        return any(self.daemons().values())

    @property
    def shape(self) -> Shape:
        """Size of the running cluster; if none runs, the requested one."""
        return self._daemons.record.shape if self.running else self.requested

    def daemons(self) -> dict[str, bool]:
        """Returns whether each daemon of the cluster runs."""
        return self._daemons.states()

    def node_states(self) -> dict[str, str]:
        """Returns the state of each node, in sinfo's long form."""
        lines = self._daemons.call("sinfo", "-hN", "-p", "main", "-o", "%N %T").splitlines()
        return {name: state for name, state in (line.split() for line in lines)}

    def start(self) -> None:
        """Starts the daemons that do not run yet, and waits until every node is idle.

        It does nothing if all daemons run, even with another size. If some run, it starts the
        others.

        Raises:
            MissingProgramsError: Slurm, munge or MariaDB is not installed.
            TestbedError: the cluster did not start; its daemons are stopped again.
        """
        needed: tuple[str, ...] = daemons.SLURM_PROGRAMS
        needed += daemons.ACCOUNTING_PROGRAMS if self.shape.accounting else ()
        daemons.find_programs(needed)
        with self._daemons.locked():
            if self.running and all(self.daemons().values()):
                self._say(f"already running in {self.layout.root}")
                return
            started = time.monotonic()
            is_new = not self.running
            try:
                if is_new:
                    self._configure()
                self._start_daemons()
                if is_new:  # Otherwise the jobs are the user's.
                    self._cancel_jobs()  # A crash may have left some in the controller's state.
                    self.wait_idle(30.0 + self.shape.nodes)
            except BaseException:
                if is_new and self.running:
                    self._stop_daemons()
                raise
            self._say(f"ready after {time.monotonic() - started:.1f} s")

    def stop(self) -> None:
        """Cancels all jobs and ends every daemon; keeps logs, state and database."""
        if not self.layout.record.exists():
            self._say(f"no cluster runs in {self.layout.root}")
            return
        with self._daemons.locked():
            self._stop_daemons()

    def set_node(self, name: str, state: str, reason: str = "testbed") -> None:
        """Sets the state of a node, such as `down`, `drain` or `resume`."""
        update = (f"NodeName={name}", f"State={state}", f"Reason={reason}")
        self._daemons.call("scontrol", "update", *update)

    def stop_controller(self) -> None:
        """Ends slurmctld: clients get no answer, running jobs continue."""
        self._daemons.end("slurmctld")

    def start_controller(self) -> None:
        """Starts slurmctld with the state that it saved, and waits until it answers."""
        conf = str(self.layout.slurm_conf)
        self._daemons.launch("slurmctld", "slurmctld", "-D", "-f", conf)
        self._daemons.wait_ready("slurmctld", self._controller_answers, timeout_s=60.0)

    def stop_accounting(self) -> None:
        """Ends slurmdbd: sacct and sacctmgr fail, everything else works."""
        self._daemons.end("slurmdbd")

    def start_accounting(self) -> None:
        """Starts slurmdbd, and waits until it answers.

        Raises:
            TestbedError: the cluster has no accounting, or slurmdbd did not start.
        """
        if not self._daemons.record.shape.accounting:
            raise TestbedError("this cluster was started without accounting")
        self._daemons.launch("slurmdbd", "slurmdbd", "-D")
        self._daemons.wait_ready("slurmdbd", self._accounting_answers, timeout_s=60.0)

    def pause(self, daemon: str) -> None:
        """Pauses a daemon (`slurmctld`, `slurmdbd`, `slurmd-n1`, …): its clients wait."""
        self._daemons.signal(daemon, signal.SIGSTOP)

    def resume(self, daemon: str) -> None:
        """Resumes a paused daemon, which then answers the requests that wait."""
        self._daemons.signal(daemon, signal.SIGCONT)

    @contextlib.contextmanager
    def configured(self, **options: str) -> Iterator[None]:
        """Runs the controller with other values of options in slurm.conf."""
        file = self.layout.slurm_conf
        before = file.read_text(encoding="utf-8")
        lines = [line for line in before.splitlines() if line.partition("=")[0] not in options]
        nodes = next(n for n, line in enumerate(lines) if line.startswith("NodeName="))
        lines[nodes:nodes] = [f"{name}={value}" for name, value in options.items()]
        try:
            self._restart_controller("\n".join(lines) + "\n")
            yield
        finally:
            self._restart_controller(before)

    def wait_idle(self, timeout_s: float = 30.0) -> None:
        """Waits until every node is up and without jobs.

        Raises:
            TestbedError: time ran out; the message holds the states of the nodes.
        """
        states: dict[str, str] = {}

        def all_idle() -> bool:
            states.clear()
            with contextlib.suppress(TestbedError):
                states.update(self.node_states())
            return len(states) == self.shape.nodes and set(states.values()) == {"idle"}

        if not daemons.wait_until(all_idle, timeout_s):
            shown = ", ".join(f"{name} {state}" for name, state in states.items()) or "no answer"
            raise TestbedError(f"nodes not idle within {timeout_s:g} s: {shown}")

    def _restart_controller(self, conf: str) -> None:
        """Restarts slurmctld with another slurm.conf, and waits until it knows its nodes."""
        self.stop_controller()
        self.layout.slurm_conf.write_text(conf, encoding="utf-8")
        self.start_controller()
        daemons.wait_until(
            lambda: not any(s.startswith("unknown") for s in self.node_states().values()), 20.0
        )

    def _configure(self) -> None:
        """Writes the configuration of a new cluster, with ports that are free now."""
        shape, layout = self.requested, self.layout
        layout.make_folders()
        port = daemons.free_ports(3 + shape.nodes)
        self._daemons.replace(Record(shape, port))
        layout.slurm_conf.write_text(config.slurm_conf(layout, shape, port), encoding="utf-8")
        layout.gres_conf.write_text(config.gres_conf(layout, shape), encoding="utf-8")
        for path in (layout.slurm_conf, layout.gres_conf):
            path.chmod(0o644)
        folder.make_fake_gpus(layout, shape.gpus)
        if not layout.munge_key.exists():
            folder.write_private(layout.munge_key, secrets.token_bytes(128))
        if shape.accounting:
            password = secrets.token_hex(16)
            text = config.slurmdbd_conf(layout, port, password)
            folder.write_private(layout.slurmdbd_conf, text)
            folder.write_private(layout.database_setup, config.database_setup(password))

    def _start_daemons(self) -> None:
        """Starts each daemon that does not run, each one after those that it needs."""
        shape = self._daemons.record.shape
        self._say("starting munged")
        self._start_munged()
        if shape.accounting:
            self._start_database()
            self._say("starting slurmdbd")
            self.start_accounting()
            self._add_account()
        self._say("starting slurmctld")
        self.start_controller()
        self._say(f"starting {shape.nodes} slurmd")
        for node in shape.node_names:
            options = ("-D", "-N", node, "-f", str(self.layout.slurm_conf))
            self._daemons.launch(f"slurmd-{node}", "slurmd", *options)

    def _start_munged(self) -> None:
        run, layout = self.layout.root / "run", self.layout
        # In a private folder, such as /run/user/1000, other users cannot reach the socket. munged
        # refuses to start there without --force.
        is_private = any(not parent.stat().st_mode & 0o001 for parent in run.parents)
        self._daemons.launch(
            "munged",
            "munged",
            "--foreground",
            *(["--force"] if is_private else []),
            f"--key-file={layout.munge_key}",
            f"--socket={layout.munge_socket}",
            f"--pid-file={run}/munged.pid",
            f"--seed-file={layout.root}/key/munge.seed",
            f"--log-file={layout.log('munged')}",
        )
        ready = functools.partial(daemons.listening, layout.munge_socket)
        self._daemons.wait_ready("munged", ready, timeout_s=20.0)

    def _start_database(self) -> None:
        layout = self.layout
        # If servers share a folder for temporary tables, such as /tmp, each one that starts deletes
        # the tables of the others, which then crash.
        common = ["--no-defaults", f"--tmpdir={layout.database_temporary}"]
        common += ["--user=root"] if os.getuid() == 0 else []
        if not layout.database.exists():
            self._say("creating the database (the first time only)")
            # Renamed when it is complete, so that an interrupted one is created again.
            new = layout.root / "db.new"
            shutil.rmtree(new, ignore_errors=True)
            self._daemons.call(
                "mariadb-install-db",
                *common,
                f"--datadir={new}",
                "--auth-root-authentication-method=socket",
                "--skip-test-db",
                timeout_s=180.0,
            )
            new.rename(layout.database)
        self._say("starting mariadbd")
        self._daemons.launch(
            "mariadbd",
            "mariadbd",
            *common,
            f"--datadir={layout.database}",
            f"--socket={layout.database_socket}",
            f"--pid-file={layout.root}/run/mariadbd.pid",
            f"--init-file={layout.database_setup}",
            "--bind-address=127.0.0.1",
            f"--port={self._daemons.record.port + 2}",
            "--innodb-buffer-pool-size=256M",  # slurmdbd logs that it wants more.
            "--innodb-lock-wait-timeout=900",  # From Slurm's accounting guide.
            "--innodb-flush-log-at-trx-commit=0",  # A testbed may lose the last second.
            "--skip-log-bin",
            "--skip-name-resolve",
        )
        # It sends its greeting only after it has run the set-up.
        ready = functools.partial(daemons.listening, layout.database_socket, greets=True)
        self._daemons.wait_ready("mariadbd", ready, timeout_s=60.0)

    def _add_account(self) -> None:
        """Gives the users of this cluster a default account, unless they have it."""
        call, cluster, account = self._daemons.call, config.CLUSTER, config.ACCOUNT
        users = {f"{user}|{account}": user for user in ("root", getpass.getuser())}
        rows = call("sacctmgr", "-nP", "list", "users", "format=User,DefaultAccount").split()
        missing = users.keys() - rows
        if not missing:
            return
        if not call("sacctmgr", "-nP", "list", "clusters", f"cluster={cluster}").strip():
            call("sacctmgr", "-i", "add", "cluster", cluster)
        if not call("sacctmgr", "-nP", "list", "accounts", f"account={account}").strip():
            call("sacctmgr", "-i", "add", "account", account, f"cluster={cluster}")
        show = ("-nP", "list", "associations", f"account={account}", "format=User")
        known = call("sacctmgr", *show).split()
        for user in sorted(users[row] for row in missing):
            if user not in known:
                call("sacctmgr", "-i", "add", "user", user, f"account={account}")
            if user == "root":  # A new cluster has an account `root`, which is root's default.
                change = ("where", "name=root", "set", f"DefaultAccount={account}")
                call("sacctmgr", "-i", "modify", "user", *change)
                call("sacctmgr", "-i", "delete", "user", "root", "account=root")

    def _controller_answers(self) -> bool:
        # A client would wait too long for a controller that does not listen yet.
        listens = daemons.listening(self._daemons.record.port)
        return listens and "is UP" in self._daemons.call("scontrol", "ping")

    def _accounting_answers(self) -> bool:
        if not daemons.listening(self._daemons.record.port + 1):
            return False
        self._daemons.call("sacctmgr", "-nP", "list", "clusters")
        return True

    def _stop_daemons(self) -> None:
        if not self.running:
            self._say(f"no cluster runs in {self.layout.root}")
        if self._daemons.alive("slurmctld"):
            # If this fails, the daemons below have to be ended all the same.
            with contextlib.suppress(TestbedError):
                self._cancel_jobs()
        # Nodes before their controller: a slurmd that cannot register ignores SIGTERM for minutes.
        self._end_all([name for name in self.daemons() if name.startswith("slurmd-")])
        daemons.terminate(daemons.steps_of(self.layout.slurm_conf), timeout_s=2.0)
        for name in ("slurmctld", "slurmdbd", "mariadbd", "munged"):
            self._end_all([name])

    def _end_all(self, names: list[str]) -> None:
        if alive := [name for name in names if self._daemons.alive(name)]:
            self._say(f"stopping {alive[0] if len(alive) == 1 else f'{len(alive)} slurmd'}")
        self._daemons.end(*names)

    def _cancel_jobs(self) -> None:
        if not (jobs := self._jobs()):
            return
        self._say("cancelling jobs")
        for first in range(0, len(jobs), 1000):
            self._daemons.call("scancel", *jobs[first : first + 1000])
        daemons.wait_until(lambda: not self._jobs(), timeout_s=10.0)  # Twice KillWait.

    def _jobs(self) -> list[str]:
        return sorted(set(self._daemons.call("squeue", "-h", "-o", "%A").split()))

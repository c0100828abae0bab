"""The list of commands, and the one place where an error becomes an exit code."""

from __future__ import annotations

import contextlib
import locale
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from hpcft import __version__
from hpcft.cli import completion
from hpcft.cli.calibrate import calibrate
from hpcft.cli.cancel import cancel
from hpcft.cli.clusters import clusters
from hpcft.cli.collect import collect
from hpcft.cli.explain import explain
from hpcft.cli.logs import logs
from hpcft.cli.params import params
from hpcft.cli.plan import plan
from hpcft.cli.recipes import recipes
from hpcft.cli.resume import resume
from hpcft.cli.schema import schema
from hpcft.cli.stage import stage
from hpcft.cli.status import status
from hpcft.cli.submit import submit
from hpcft.core.errors import EXIT_INTERRUPTED, EXIT_OK, EXIT_USAGE, HpcftError
from hpcft.core.tested_versions import untested_versions_note

COMMANDS: tuple[Callable[..., None], ...] = (
    plan, params, stage, submit, resume, status, explain, logs, cancel, collect, calibrate, recipes,
    clusters, schema,
)  # fmt: skip

app = typer.Typer(
    name="hpcft",
    no_args_is_help=True,
    add_completion=False,  # `completion` has these options, and takes the shell's name as well.
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # Drawing the help with rich takes longer than all else in `--help`.
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(is_given: bool) -> None:
    if is_given:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
    _install_completion: completion.InstallCompletion = None,
    _show_completion: completion.ShowCompletion = None,
) -> None:
    """Fine-tune language models on a Slurm cluster.

    Before it submits a run, hpcft plans how the run fits the cluster; a run that it accepts fits.
    """


for command in COMMANDS:
    app.command()(command)


def main() -> None:
    """Runs the command line, and exits with the code that `core/errors.py` documents."""
    _use_utf8()
    if completion.VARIABLE in os.environ:
        completion.enable()
    else:
        # Nothing that goes wrong with a mere note may stop a command.
        with contextlib.suppress(Exception):
            if note := untested_versions_note(Path(typer.__file__).parents[1]):
                sys.stderr.write(note + "\n")
    try:
        code = app(completion.with_shell(sys.argv[1:]), prog_name="hpcft", standalone_mode=False)
    except HpcftError as error:
        _exit_with(str(error), error.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        sys.stderr.close()  # The reader is gone (`hpcft status | head`), which is not an error.
        sys.exit(EXIT_OK)
    except OSError as error:
        what = f"{error.filename or 'input or output'}: {error.strerror or error}"
        _exit_with(what, EXIT_USAGE)
    except Exception as error:
        if not hasattr(error, "format_message"):  # Only the usage errors of click have it.
            raise
        show = getattr(error, "show", None)
        if show:
            show()
        sys.exit(getattr(error, "exit_code", EXIT_USAGE))
    sys.exit(code if isinstance(code, int) else EXIT_OK)


def _use_utf8() -> None:
    """Starts this command again in Python's UTF-8 mode, if the locale has another encoding.

    Otherwise the path of a run folder would be another text here than in the job, and libraries
    could not write what the user's data hold.
    """
    encoding = locale.getencoding()
    if sys.flags.utf8_mode or encoding.lower() in ("utf-8", "utf8"):
        return
    os.environ["PYTHONUTF8"] = "1"
    # The terminal still expects the encoding of the locale.
    os.environ.setdefault("PYTHONIOENCODING", f"{encoding}:backslashreplace")
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _exit_with(message: str, code: int) -> None:
    from hpcft.cli import console  # Most commands print no error.

    console.error(message)
    sys.exit(code)

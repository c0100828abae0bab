"""The list of verbs, and the one place where an error becomes an exit code."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from hpcft import __version__
from hpcft.core.errors import EXIT_INTERRUPTED, EXIT_OK, EXIT_USAGE, HpcftError

app = typer.Typer(
    name="hpcft",
    help="Fine-tune language models on a Slurm cluster: a run that is accepted fits.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: drawing it would cost more than all else in `--help`
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Fine-tune language models on a Slurm cluster: a run that is accepted fits."""


def _register() -> None:
    from hpcft.cli import (
        cancel,
        clusters,
        collect,
        explain,
        logs,
        params,
        plan,
        recipes,
        resume,
        schema,
        stage,
        status,
        submit,
    )

    for verb in (
        plan, params, stage, submit, resume, status, explain, logs, cancel, collect, recipes,
        clusters, schema,
    ):  # fmt: skip
        verb.add_to(app)


_register()


def main() -> None:
    """Runs the command line and exits with the code that errors.py documents."""
    try:
        code = app(prog_name="hpcft", standalone_mode=False)
    except HpcftError as error:
        from hpcft.cli import console

        console.error(str(error))
        sys.exit(error.exit_code)
    except typer.Abort:
        sys.exit(EXIT_INTERRUPTED)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        sys.stderr.close()  # the reader went away (`hpcft status | head`): nothing to complain of
        sys.exit(EXIT_OK)
    except OSError as error:
        from hpcft.cli import console

        console.error(f"{error.filename or 'input or output'}: {error.strerror or error}")
        sys.exit(EXIT_USAGE)
    except Exception as error:
        if not hasattr(error, "format_message"):  # one of click's usage errors has it
            raise
        show = getattr(error, "show", None)
        if show:
            show()
        sys.exit(getattr(error, "exit_code", 2))
    sys.exit(code if isinstance(code, int) else EXIT_OK)

"""Every error a user can meet, and the exit code that each one ends in.

    HpcftError                 1   anything below; caught once, in cli/app.py
    ├── RunFailed              1   a run that was watched did not complete
    ├── UsageError             2   a wrong command line, or a state that does not allow it
    │   ├── InputError         2   a recipe or profile is wrong; lists every problem at once
    │   ├── DoesNotFit         2   the plan exceeds the cluster; names the smallest change that fits
    │   └── StoreError         2   a run folder is unsafe, damaged or locked
    ├── ClusterError           3   a scheduler command failed, is missing or did not answer
    ├── HubError               3   the Hugging Face hub cannot be reached or did not answer
    └── DataError              2   a data file, model or tokenizer cannot be used

Exit code 0 is success and 130 an interruption. `assert` is for our own mistakes only.
"""

from __future__ import annotations

from dataclasses import dataclass

EXIT_OK = 0
EXIT_RUN_FAILED = 1
EXIT_USAGE = 2
EXIT_CLUSTER = 3
EXIT_INTERRUPTED = 130


class HpcftError(Exception):
    """Anything that a user has to be told in a sentence instead of a traceback."""

    exit_code = EXIT_RUN_FAILED


class RunFailed(HpcftError):
    """A run that the user waited for ended without a result."""


class UsageError(HpcftError):
    """The command line, or the state of what it names, does not allow the request."""

    exit_code = EXIT_USAGE


class ClusterError(HpcftError):
    """A scheduler command failed, is missing, or did not answer in time."""

    exit_code = EXIT_CLUSTER


class HubError(HpcftError):
    """The Hugging Face hub cannot be reached, or did not answer as it should."""

    exit_code = EXIT_CLUSTER


class DoesNotFit(UsageError):
    """No layout of the run fits the cluster; `short` says so in the cell of a table."""

    def __init__(self, message: str, short: str) -> None:
        super().__init__(message)
        self.short = short


class StoreError(UsageError):
    """A run folder is unsafe (others may write to it), damaged or in use."""


class DataError(UsageError):
    """A data file, model folder or tokenizer cannot be used as the recipe asks."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with an input: where it stands, what it is and how to mend it."""

    where: str
    """`file:line`, or the command-line option that the text came from."""
    key: str
    """Dotted path inside the document; empty for the document as a whole."""
    what: str
    """What was expected and what was got."""
    fix: str = ""
    """What to write instead, if that is known."""

    def __str__(self) -> str:
        key = f" {self.key}" if self.key else ""
        fix = f"; {self.fix}" if self.fix else ""
        return f"{self.where}{key}: {self.what}{fix}"


class InputError(UsageError):
    """A recipe, profile or override is wrong; `problems` holds all of what was found."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = problems
        super().__init__("\n".join(str(problem) for problem in problems))

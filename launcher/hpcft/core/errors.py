"""The errors that a user can meet, and the exit code of each.

    HpcftError                 1   base of all; caught once, in cli/app.py
    ├── RunFailed              1   a run that the user watched did not complete
    ├── UsageError             2   a wrong command line, or a state that does not allow it
    │   ├── InputError         2   a recipe or profile is wrong; lists every problem at once
    │   ├── DoesNotFit         2   the run does not fit the cluster; names the smallest change
    │   ├── StoreError         2   a run folder is unsafe, damaged or locked
    │   └── DataError          2   a data file, model or tokenizer cannot be used
    ├── ClusterError           3   a scheduler command failed, is missing or did not answer
    └── HubError               3   the Hugging Face hub cannot be reached or did not answer

Exit code 0 is success and 130 an interruption. `assert` is for errors of hpcft itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

EXIT_OK = 0
EXIT_RUN_FAILED = 1
EXIT_USAGE = 2
EXIT_CLUSTER = 3
EXIT_INTERRUPTED = 130


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's text; the name of its class if it has no text."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


class HpcftError(Exception):
    """Base of the errors that the user reads as a sentence instead of a traceback."""

    exit_code = EXIT_RUN_FAILED


class RunFailed(HpcftError):
    """A run that the user watched ended without a result."""


class UsageError(HpcftError):
    """The command line is wrong, or the state of a run does not allow the command."""

    exit_code = EXIT_USAGE


class ClusterError(HpcftError):
    """A scheduler command failed, is missing, or did not answer in time."""

    exit_code = EXIT_CLUSTER


class HubError(HpcftError):
    """The Hugging Face hub cannot be reached, or did not answer as expected."""

    exit_code = EXIT_CLUSTER


class DoesNotFit(UsageError):
    """No layout of the run fits the cluster."""

    def __init__(self, message: str, short: str) -> None:
        super().__init__(message)
        self.short = short
        """The reason in a few words, for the cell of a table."""


class StoreError(UsageError):
    """A run folder is unsafe (others may write to it), damaged or in use."""


class DataError(UsageError):
    """A data file, model folder or tokenizer cannot be used as the recipe asks."""


@dataclass(frozen=True)
class Problem:
    """One problem of an input: its place, what is wrong, and how to correct it."""

    where: str
    """`file:line`, or the command-line option that the text came from."""
    key: str
    """Dotted path inside the document; empty for the document as a whole."""
    what: str
    """Description of the problem: expected and actual content."""
    fix: str = ""
    """Correction to make; empty if it is not known."""

    def __str__(self) -> str:
        key = f" {self.key}" if self.key else ""
        fix = f"; {self.fix}" if self.fix else ""
        return f"{self.where}{key}: {self.what}{fix}"


class InputError(UsageError):
    """A recipe, profile or override is wrong; `problems` lists everything that is."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = problems
        super().__init__("\n".join(str(problem) for problem in problems))


class Problems:
    """Collects all problems of an input, so that the user can correct them at once."""

    def __init__(self, location_of: Callable[[str], str]) -> None:
        """Starts with no problem.

        Args:
            location_of: gives the place of a dotted key: `file:line`, or a command-line option.
        """
        self.found: list[Problem] = []
        self._location_of = location_of

    def add(
        self, key: str, what: str = "", *, expected: str = "", got: object = None, fix: str = ""
    ) -> None:
        """Adds a problem.

        Args:
            key: dotted path of the field.
            what: the problem in words; by default made of `expected` and `got`.
            expected: what the field may be.
            got: what it is.
            fix: the correction to make, if it is known.
        """
        text = what or f"expected {expected}, got {got}"
        self.found.append(Problem(self._location_of(key), key, text, fix))

    def raise_if_any(self) -> None:
        """Raises InputError with all problems, if there are any."""
        if self.found:
            raise InputError(self.found)

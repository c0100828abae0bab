"""What a user is told of a model whose code cannot be followed without data."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from hpcft.core.errors import DataError


@contextlib.contextmanager
def translate_trace_errors(what: str, fix: str) -> Iterator[None]:
    """Makes one sentence of whatever a stranger's module raises on shapes without data.

    Args:
        what: what was traced, for example `its training step`.
        fix: what to use instead.

    Raises:
        DataError: it cannot be traced.
    """
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise DataError(
            f"model: {what} cannot be traced: {type(error).__name__}: {reason}\n  use {fix}"
        ) from None

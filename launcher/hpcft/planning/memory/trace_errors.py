"""Translates errors of tracing a model into one message for the user."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from hpcft.core.errors import DataError


@contextlib.contextmanager
def translate_trace_errors(what: str, fix: str) -> Iterator[None]:
    """Turns any error of a model's code on the meta device into a `DataError`.

    Args:
        what: what is traced, for example `a training step`.
        fix: what to use instead.

    Raises:
        DataError: the model cannot be traced.
    """
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise DataError(
            f"model: hpcft cannot trace {what} of this model, which it needs to predict memory: "
            f"{type(error).__name__}: {reason}\n  use {fix}"
        ) from None

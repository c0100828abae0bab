"""Whole numbers of a label column that say how they are meant."""

from __future__ import annotations

from collections.abc import Sequence


class ClassValue(int):
    """An index of a `ClassLabel` column, which names its classes itself."""

    names: Sequence[str]
    """Names of the data set's classes, in its own order."""

    def __new__(cls, index: int, names: Sequence[str]) -> ClassValue:
        """Returns the index with the names of all classes."""
        value = super().__new__(cls, index)
        value.names = names
        return value

    @property
    def name(self) -> str | None:
        """Name of the class; None if the index is none of the classes, as -1 for "no label"."""
        return self.names[self] if 0 <= self < len(self.names) else None


class PlainIndex(int):
    """A label that the data give as a bare index, so that only the order of `labels` names it."""


def are_numbers(names: Sequence[str]) -> bool:
    """Returns whether the names of classes are their indices, and so say nothing."""
    return list(names) == [str(index) for index in range(len(names))]

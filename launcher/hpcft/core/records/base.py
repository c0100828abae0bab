"""Base classes of the records, and types of text that may reach sbatch, a path or a shell."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    StringConstraints,
    model_validator,
)
from pydantic_core import CoreSchema

Auto = Literal["auto"]
Precision = Literal["bf16", "fp16", "fp32"]
Offload = Literal["none", "cpu", "nvme"]
Split = Literal["train", "validation", "test"]

# Texts that may reach sbatch, a path or a shell line. They allow no character that is special to a
# shell or to #SBATCH. Lengths in the thousands are apart from the pattern, because a pattern that
# counts that far takes 30 ms to build.
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")]
SlurmWord = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.:+-]{0,127}$")]
SlurmExpression = Annotated[
    str, StringConstraints(pattern=r"^[A-Za-z0-9\[(][A-Za-z0-9_.:,|&*()\[\]-]{0,255}$")
]
Revision = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_./-]{0,127}$")]
OneLine = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f]+$", max_length=4096)]
# A command and its arguments, separated by blanks. The job's shell expands `$NAME`, nothing else.
CommandLine = Annotated[
    str,
    StringConstraints(
        pattern=r"^(\$?[A-Za-z0-9_./~]|\$\{[A-Za-z0-9_]+\})"
        r"(\$?[A-Za-z0-9_./:=,@%+~ -]|\$\{[A-Za-z0-9_]+\})*$",
        max_length=4096,
    ),
]
AbsolutePath = Annotated[str, StringConstraints(pattern=r"^/[^\x00-\x1f\x7f]*$", max_length=4096)]
VariableName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,127}$")]
ColumnName = Annotated[str, StringConstraints(min_length=1, max_length=256)]

# A process id or a Slurm job id, `123` or `123_4`. It goes into file names and to scancel.
JobId = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,10}(_[0-9]{1,10})?$")]
AnyPath = Annotated[str, StringConstraints(pattern=r"^[^\x00]+$", max_length=4096)]

PositiveInt = Annotated[int, Field(gt=0)]
# Larger than any real quantity in any unit, and small enough that products of two stay finite.
MAX_QUANTITY = 1e12
NonNegative = Annotated[float, Field(ge=0, le=MAX_QUANTITY)]
Positive = Annotated[float, Field(gt=0, le=MAX_QUANTITY)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Share = Annotated[float, Field(gt=0, le=1)]

# Sums and products of a few numbers of this size are still finite.
MAX_NUMBER = 1e100
MAX_STORED_INTEGER = 2**63 - 1
"""Largest integer in a stored record: more than any count, size in bytes or time in nanoseconds."""


def _check_number(name: str, value: object) -> None:
    if isinstance(value, int | float) and abs(value) > MAX_NUMBER:
        raise ValueError(f"{name} is beyond {MAX_NUMBER:g}")


class Record(BaseModel):
    """Base of all records: strict, immutable, with a docstring under each field."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        validate_by_name=True,
        # Validators are built on first use, and `config.schema` reads the docstrings of fields only
        # when it prints them. Doing both at import would take a tenth of a command's time.
        defer_build=True,
    )


class InputRecord(Record):
    """Base of the records that people write: closed, so that a misspelt field is an error."""

    @model_validator(mode="after")
    def _check_numbers(self) -> Self:
        for name, value in self:
            for part in value.values() if isinstance(value, dict) else (value,):
                _check_number(name, part)
        return self


def _bound_numbers(schema: object) -> None:
    """Adds bounds to the numbers in a pydantic schema that have none; other models have theirs."""
    if isinstance(schema, list):
        for part in schema:
            _bound_numbers(part)
    if not isinstance(schema, dict):
        return
    largest = {"int": MAX_STORED_INTEGER, "float": MAX_NUMBER}.get(str(schema.get("type")))
    if largest is not None:
        for bound, other, value in (("ge", "gt", -largest), ("le", "lt", largest)):
            if other not in schema:
                schema.setdefault(bound, value)
    for key, part in schema.items():
        if key in ("schema", "items_schema", "values_schema", "choices", "definitions"):
            _bound_numbers(part)
        elif key == "fields":
            _bound_numbers(list(part.values()))


class StoredPart(Record):
    """Base of the parts of stored records: open, so that an older hpcft can read a newer file.

    Every field that is added has a default, so that a newer hpcft can read an older file.
    """

    model_config = ConfigDict(extra="ignore")

    @classmethod
    def __get_pydantic_core_schema__(
        cls, source: type[BaseModel], handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        """Returns pydantic's schema of the class, with bounds on all numbers.

        pydantic checks them while it parses. A status of many runs reads a million numbers, for
        which a loop in Python would take three quarters of its time.
        """
        schema = handler(source)
        _bound_numbers(schema)
        return schema


def renamed_from(old: str, new: str) -> AliasChoices:
    """Returns the two names of a renamed field that are read; only the new one is written.

    Args:
        old: name in files that hpcft 0.1 wrote.
        new: name today.
    """
    return AliasChoices(new, old)


class StoredRecord(StoredPart):
    """Base of the files that hpcft writes: open like their parts, with a format version."""

    schema_version: PositiveInt = 1
    """Version of the file's format. It rises only when an older hpcft would misread the file; the
    older hpcft then refuses it."""

    @classmethod
    def known_version(cls) -> int:
        """Returns the newest version that this hpcft can read."""
        version: int = cls.model_fields["schema_version"].default
        return version

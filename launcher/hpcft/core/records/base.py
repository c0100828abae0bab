"""Bases of the records, and the text types that may reach sbatch, a path or a shell."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    model_validator,
)

Auto = Literal["auto"]
Precision = Literal["bf16", "fp16", "fp32"]
Offload = Literal["none", "cpu", "nvme"]
Split = Literal["train", "validation", "test"]

# What may reach sbatch, a path or a shell line. Nothing here is special to a shell or to #SBATCH.
# Lengths in the thousands stand beside the pattern: one that counts that far takes 30 ms to build.
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")]
SlurmWord = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.:+-]{0,127}$")]
SlurmExpression = Annotated[
    str, StringConstraints(pattern=r"^[A-Za-z0-9\[(][A-Za-z0-9_.:,|&*()\[\]-]{0,255}$")
]
Revision = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_./-]{0,127}$")]
OneLine = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f]+$", max_length=4096)]
# A command and its arguments, words apart; `$NAME` is filled in by the job's shell, no more.
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

# A process or a job of Slurm, `123` or `123_4`: it goes into file names and to scancel.
JobId = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,10}(_[0-9]{1,10})?$")]
AnyPath = Annotated[str, StringConstraints(pattern=r"^[^\x00]+$", max_length=4096)]

PositiveInt = Annotated[int, Field(gt=0)]
# No quantity is larger, whatever its unit; beyond, products of two would no longer be finite.
MOST = 1e12
NonNegative = Annotated[float, Field(ge=0, le=MOST)]
Positive = Annotated[float, Field(gt=0, le=MOST)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Share = Annotated[float, Field(gt=0, le=1)]


# Sums and products of a few numbers up to here can still be told from infinity.
MOST_NUMBER = 1e100


def _check_number(name: str, value: object) -> None:
    if isinstance(value, int | float) and abs(value) > MOST_NUMBER:
        raise ValueError(f"{name} is beyond {MOST_NUMBER:g}")


class Record(BaseModel):
    """Base of all records: strict, immutable, documented by the docstrings under their fields."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        validate_by_name=True,
        # Reading the sources for the attributes' docstrings and building what a command does not
        # use would take a tenth of its time; `config.schema` reads the docstrings when asked.
        defer_build=True,
    )

    @model_validator(mode="after")
    def _check_numbers(self) -> Self:
        for name, value in self:
            for part in value.values() if isinstance(value, dict) else (value,):
                _check_number(name, part)
        return self


class InputRecord(Record):
    """Base of what people write: closed, so that a misspelt field is an error."""


class StoredPart(Record):
    """Base of the parts of stored records: open, so that an older hpcft reads what a newer wrote.

    A field that is added has a default, so that a newer hpcft reads what an older one wrote.
    """

    model_config = ConfigDict(extra="ignore")


def renamed_from(old: str, new: str) -> AliasChoices:
    """Returns the names under which a stored field is read: today's, and that of hpcft 0.1.

    Both stay readable for a release; today's is written.
    """
    return AliasChoices(new, old)


class StoredRecord(StoredPart):
    """Base of the files that hpcft writes: open like their parts, with a version of the format."""

    schema_version: PositiveInt = 1
    """Version of the file's format. It rises only when an older hpcft would misread the file, which
    then refuses it."""

    @classmethod
    def known_version(cls) -> int:
        """Returns the newest version that this hpcft can read."""
        version: int = cls.model_fields["schema_version"].default
        return version

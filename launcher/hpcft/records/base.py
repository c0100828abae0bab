"""What every record shares: strictness, and the words that may reach sbatch, a path or a shell."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

Auto = Literal["auto"]
Precision = Literal["bf16", "fp16", "fp32"]
Offload = Literal["none", "cpu", "nvme"]
Split = Literal["train", "validation", "test"]

# What may reach sbatch, a path or a shell line. Nothing here is special to a shell or to #SBATCH.
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")]
SlurmWord = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.:+-]{0,127}$")]
SlurmExpression = Annotated[
    str, StringConstraints(pattern=r"^[A-Za-z0-9\[(][A-Za-z0-9_.:,|&*()\[\]-]{0,255}$")
]
Revision = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_./-]{0,127}$")]
OneLine = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f]{1,4096}$")]
# A command and its arguments, words apart; `$NAME` is filled in by the job's shell, no more.
CommandLine = Annotated[
    str,
    StringConstraints(
        pattern=r"^(\$?[A-Za-z0-9_./~]|\$\{[A-Za-z0-9_]+\})"
        r"(\$?[A-Za-z0-9_./:=,@%+~ -]|\$\{[A-Za-z0-9_]+\}){0,4095}$"
    ),
]
AbsolutePath = Annotated[str, StringConstraints(pattern=r"^/[^\x00-\x1f\x7f]{0,4095}$")]
VariableName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,127}$")]
ColumnName = Annotated[str, StringConstraints(min_length=1, max_length=256)]

PositiveInt = Annotated[int, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Share = Annotated[float, Field(gt=0, le=1)]


class Record(BaseModel):
    """Base of every record: strict, closed, immutable, documented by its attribute docstrings."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        # Reading the sources for the attributes' docstrings and building what a command does not
        # use would take a tenth of its time; `reference` reads the docstrings when asked.
        defer_build=True,
    )

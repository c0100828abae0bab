"""Failure: class, evidence, place and next step of a failed run."""

from __future__ import annotations

from dataclasses import dataclass

from hpcft.recovery.diagnosis.classes import KNOWN, Policy
from hpcft.recovery.diagnosis.evidence import one_line


@dataclass(frozen=True)
class Failure:
    """Reason why a run has no result."""

    name: str
    """Failure class, for example `gpu_oom`."""
    evidence: str
    """Decisive line of a log or error file, or a description of Slurm's state."""
    next_step: str
    """Advice for the user."""
    policy: Policy
    """Action that hpcft takes by itself."""
    rank: int | None = None
    """Global rank that failed; None if it is not known."""
    node: str = ""
    """Node of the failure; empty if it is not known."""
    source: str = ""
    """File that holds the evidence; empty if the evidence is the scheduler's state."""

    @property
    def sentence(self) -> str:
        """The evidence, after its rank and node."""
        place = f"rank {self.rank}" if self.rank is not None else ""
        place += f"{' ' * bool(place)}on {self.node}" if self.node else ""
        if not place or self.evidence.startswith(f"rank {self.rank} "):
            return self.evidence
        return f"{place}: {self.evidence}"

    def as_dict(self) -> dict[str, str | int | None]:
        """Returns the failure for JSON output."""
        fields = {key: value for key, value in vars(self).items() if key != "name"}
        return {"class": self.name, "sentence": self.sentence, **fields}

    def __str__(self) -> str:
        return f"{self.name}: {self.sentence}; {self.next_step}"


def from_class(name: str, evidence: str) -> Failure:
    """Returns a failure of a class; a class of another version gets the advice for `unknown`."""
    row = KNOWN.get(name, KNOWN["unknown"])
    return Failure(name, one_line(evidence), row.next_step, row.policy)

"""What an explanation is made of: class, evidence, place, next step."""

from __future__ import annotations

from dataclasses import dataclass

from hpcft.recovery.diagnosis.classes import KNOWN, Policy
from hpcft.recovery.diagnosis.evidence import one_line


@dataclass(frozen=True)
class Failure:
    """Why a run has no result."""

    name: str
    """Class, for example `gpu_oom`."""
    evidence: str
    """The decisive line, or what Slurm's state says in words."""
    next_step: str
    """What to do."""
    policy: Policy
    """What hpcft does about it."""
    rank: int | None = None
    """Global rank that it happened to; None where that is not known."""
    node: str = ""
    """Node that it happened on; empty where that is not known."""
    source: str = ""
    """File that the evidence stands in; empty where the scheduler said it."""

    @property
    def sentence(self) -> str:
        """What happened, to whom and where."""
        where = f"rank {self.rank}" if self.rank is not None else ""
        where += f"{' ' * bool(where)}on {self.node}" if self.node else ""
        if not where or self.evidence.startswith(f"rank {self.rank} "):
            return self.evidence
        return f"{where}: {self.evidence}"

    def as_dict(self) -> dict[str, str | int | None]:
        """For programs."""
        own = {key: value for key, value in vars(self).items() if key != "name"}
        return {"class": self.name, "sentence": self.sentence, **own}

    def __str__(self) -> str:
        return f"{self.name}: {self.sentence}; {self.next_step}"


def from_class(name: str, evidence: str) -> Failure:
    """A failure of a known class; of a class that another version knew, as much as is known."""
    known = KNOWN.get(name, KNOWN["unknown"])
    return Failure(name, one_line(evidence), known.next_step, known.policy)

"""Diagnoses a failed run: its failure class, a sentence and what to do next.

`classes` holds the failure classes as data; `evidence` reads error files and logs; `from_logs` and
`from_scheduler` turn texts and Slurm's states into failures; `explain` decides between them.
"""

from hpcft.recovery.diagnosis.classes import KNOWN, POLICIES
from hpcft.recovery.diagnosis.explain import classify, explain_failure, is_secondary
from hpcft.recovery.diagnosis.failure import Failure
from hpcft.recovery.diagnosis.from_scheduler import held_reason

__all__ = [
    "KNOWN",
    "POLICIES",
    "Failure",
    "classify",
    "explain_failure",
    "held_reason",
    "is_secondary",
]

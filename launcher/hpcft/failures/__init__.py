"""Why a run failed: evidence to a class, a sentence and a next step.

`classes` holds what is evidence of what, as data; `evidence` reads what was said from a run folder;
`texts` and `scheduler` make failures of what was said and of Slurm's states; `explanation` decides
between them.
"""

from hpcft.failures.classes import CAUSES, CONSEQUENCES, KNOWN, POLICIES, FailureClass, Policy
from hpcft.failures.evidence import error_file, rank_errors, tell
from hpcft.failures.explanation import explain, judged, only_followed
from hpcft.failures.failure import Failure
from hpcft.failures.scheduler import held
from hpcft.marks import STARTS_AGAIN
from hpcft.records import RankError

__all__ = [
    "CAUSES",
    "CONSEQUENCES",
    "KNOWN",
    "POLICIES",
    "STARTS_AGAIN",
    "Failure",
    "FailureClass",
    "Policy",
    "RankError",
    "error_file",
    "explain",
    "held",
    "judged",
    "only_followed",
    "rank_errors",
    "tell",
]

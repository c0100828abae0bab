"""Why a run failed: evidence to a class, a sentence and a next step.

`classes` holds what is evidence of what, as data; `evidence` reads what was said from a run folder;
`texts` and `scheduler` make failures of what was said and of Slurm's states; `explanation` decides
between them.
"""

from hpcft.core.log_markers import STARTS_AGAIN
from hpcft.core.rank_errors import rank_error_file, read_rank_errors, write_rank_error
from hpcft.core.records import RankError
from hpcft.recovery.diagnosis.classes import (
    CAUSES,
    CONSEQUENCES,
    KNOWN,
    POLICIES,
    FailureClass,
    Policy,
)
from hpcft.recovery.diagnosis.explain import classify, explain_failure, is_secondary
from hpcft.recovery.diagnosis.failure import Failure
from hpcft.recovery.diagnosis.from_scheduler import held_reason

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
    "rank_error_file",
    "explain_failure",
    "held_reason",
    "classify",
    "is_secondary",
    "read_rank_errors",
    "write_rank_error",
]

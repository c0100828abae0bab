"""The nouns of hpcft, in the order of the story.

A Recipe says what to train, a Cluster what there is, a Plan how it fits, a Job where it was
submitted, Progress how far it is, a RunRecord what came out. Every field is defined once, here (or
beside its task or method): validation, the JSON Schema and the reference page all come from it.
"""

from hpcft.core.records.base import (
    InputRecord,
    Offload,
    Precision,
    Record,
    Split,
    StoredPart,
    StoredRecord,
)
from hpcft.core.records.checkpoint import Checkpoint
from hpcft.core.records.cluster import CALIBRATION_BOUNDS, Calibration, Cluster, Gpu, OomCaps
from hpcft.core.records.job import Attempt, Fingerprints, Job
from hpcft.core.records.plan import (
    EvaluatedLayout,
    Layout,
    MemoryItem,
    ModelFacts,
    ParameterCount,
    Plan,
    RunTime,
    StepTime,
    ZeroSizes,
)
from hpcft.core.records.progress import Progress
from hpcft.core.records.recipe import (
    Baseline,
    DataSpec,
    Evaluation,
    Method,
    ModelSpec,
    Recipe,
    Resources,
    Sweep,
    Task,
    TokenizerTraining,
    Train,
)
from hpcft.core.records.recovery import RankError, Recovery
from hpcft.core.records.result import Confusion, Measurement, PhasePeaks, Prediction, RunRecord
from hpcft.core.records.staged import Staged, StagedFile, StagedInputs

__all__ = [
    "CALIBRATION_BOUNDS",
    "EvaluatedLayout",
    "Attempt",
    "Baseline",
    "Calibration",
    "Checkpoint",
    "Cluster",
    "Confusion",
    "DataSpec",
    "Evaluation",
    "Fingerprints",
    "InputRecord",
    "Gpu",
    "Job",
    "Layout",
    "OomCaps",
    "Measurement",
    "MemoryItem",
    "Method",
    "ModelFacts",
    "ModelSpec",
    "Offload",
    "ParameterCount",
    "PhasePeaks",
    "Plan",
    "Precision",
    "Prediction",
    "Progress",
    "RankError",
    "Recipe",
    "Record",
    "Recovery",
    "Resources",
    "RunRecord",
    "RunTime",
    "Split",
    "Staged",
    "StagedFile",
    "StagedInputs",
    "StoredPart",
    "StoredRecord",
    "StepTime",
    "Sweep",
    "Task",
    "TokenizerTraining",
    "Train",
    "ZeroSizes",
]

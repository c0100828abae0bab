"""The records of hpcft: what people write, and what run folders hold.

A Recipe describes an experiment, a Cluster a site, a Plan how the one fits the other, a Job the
submissions of a run, Progress its current step, and a RunRecord its result. Every field is defined
once, here or with its task or method: validation, the JSON Schema and the reference page all come
from that definition.
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
from hpcft.core.records.cluster import (
    CALIBRATION_BOUNDS,
    Calibration,
    Cluster,
    Gpu,
    LearnedValue,
    OomCaps,
)
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
    "Attempt",
    "Baseline",
    "Calibration",
    "Checkpoint",
    "Cluster",
    "Confusion",
    "DataSpec",
    "EvaluatedLayout",
    "Evaluation",
    "Fingerprints",
    "Gpu",
    "InputRecord",
    "Job",
    "Layout",
    "LearnedValue",
    "Measurement",
    "MemoryItem",
    "Method",
    "ModelFacts",
    "ModelSpec",
    "Offload",
    "OomCaps",
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
    "StepTime",
    "StoredPart",
    "StoredRecord",
    "Sweep",
    "Task",
    "TokenizerTraining",
    "Train",
    "ZeroSizes",
]

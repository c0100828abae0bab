"""The nouns of hpcft, in the order of the story.

A Recipe says what to train, a Cluster what there is, a Plan how it fits, a Job where it was
submitted, Progress how far it is, a RunRecord what came out. Every field is defined once, here (or
beside its task or method): validation, the JSON Schema and the reference page all come from it.
"""

from hpcft.records.base import Offload, Precision, Record, Split
from hpcft.records.cluster import Cluster, Gpu
from hpcft.records.plan import Layout, MemoryItem, ModelFacts, ParameterCount, Plan
from hpcft.records.recipe import (
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
from hpcft.records.run import Attempt, Fingerprints, Job, Measured, Progress, RunRecord

__all__ = [
    "Attempt",
    "Baseline",
    "Cluster",
    "DataSpec",
    "Evaluation",
    "Fingerprints",
    "Gpu",
    "Job",
    "Layout",
    "Measured",
    "MemoryItem",
    "Method",
    "ModelFacts",
    "ModelSpec",
    "Offload",
    "ParameterCount",
    "Plan",
    "Precision",
    "Progress",
    "Recipe",
    "Record",
    "Resources",
    "RunRecord",
    "Split",
    "Sweep",
    "Task",
    "TokenizerTraining",
    "Train",
]

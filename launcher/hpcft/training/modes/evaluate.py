"""A run that trains nothing: what was trained before is scored, as at the end of a training."""

from __future__ import annotations

from hpcft.config.recipe_types import FullRecipe
from hpcft.core.paths import RunPaths
from hpcft.core.records import Cluster, Plan
from hpcft.training.data import prepare
from hpcft.training.distributed import rank_env
from hpcft.training.modes.finetune import score, trainer_of, training_arguments
from hpcft.training.modes.result import write_record
from hpcft.training.telemetry.progress import Heartbeat
from hpcft.training.trainer import model as models


def run(
    paths: RunPaths,
    recipe: FullRecipe,
    cluster: Cluster,
    plan: Plan,
    heartbeat: Heartbeat,
    generation: int,
) -> None:
    """Scores; rank 0 writes the record. Arguments as of `loop.run`."""
    summary = prepare.together(paths, recipe, cluster, plan, heartbeat, generation)
    tokenizer = prepare.load_tokenizer(paths)
    scored = prepare.load_split(paths, recipe.evaluation.split)
    assert scored is not None
    heartbeat.set(phase="model")
    rank_env.communicate(plan)
    arguments = training_arguments(paths, recipe, plan, 1, has_validation=False)
    model = models.load(paths, recipe, plan, tokenizer)
    parameters = models.counted(model, plan.facts)
    trainer = trainer_of(recipe, plan, arguments, model, tokenizer, None, None, heartbeat)
    heartbeat.set(phase="evaluation", step=0, total_steps=len(scored))
    metrics = score(trainer, scored, heartbeat, recipe.evaluation.split)
    heartbeat.set(phase="saving")
    write_record(paths, recipe, cluster, plan, heartbeat, summary, parameters, metrics=metrics)
    heartbeat.set(phase="done")

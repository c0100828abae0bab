"""A run that trains nothing: what was trained before is scored, as at the end of a training."""

from __future__ import annotations

from hpcft.config.recipe_types import FullRecipe
from hpcft.core.paths import RunPaths
from hpcft.core.records import Cluster, Plan
from hpcft.training.data import prepare
from hpcft.training.distributed import rank_env
from hpcft.training.modes.finetune import make_trainer, score_split, training_arguments
from hpcft.training.modes.result import write_result
from hpcft.training.telemetry.progress import ProgressReporter
from hpcft.training.trainer.model import check_parameter_count, load_model


def run_evaluation(
    paths: RunPaths,
    recipe: FullRecipe,
    cluster: Cluster,
    plan: Plan,
    heartbeat: ProgressReporter,
    generation: int,
) -> None:
    """Scores; rank 0 writes the record. Arguments as of `loop.run`."""
    summary = prepare.prepare_all_ranks(paths, recipe, cluster, plan, heartbeat, generation)
    tokenizer = prepare.load_tokenizer(paths)
    scored = prepare.load_split(paths, recipe.evaluation.split)
    assert scored is not None
    heartbeat.set(phase="model")
    rank_env.init_process_group(plan)
    arguments = training_arguments(paths, recipe, plan, 1, has_validation=False)
    model = load_model(paths, recipe, plan, tokenizer)
    parameters = check_parameter_count(model, plan.facts)
    trainer = make_trainer(recipe, plan, arguments, model, tokenizer, None, None, heartbeat)
    heartbeat.set(phase="evaluation", step=0, total_steps=len(scored))
    metrics = score_split(trainer, scored, heartbeat, recipe.evaluation.split)
    heartbeat.set(phase="saving")
    write_result(paths, recipe, cluster, plan, heartbeat, summary, parameters, metrics=metrics)
    heartbeat.set(phase="done")

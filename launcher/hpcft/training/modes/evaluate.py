"""Evaluation mode: scores a finished model or adapter, as at the end of its training."""

from __future__ import annotations

from hpcft.training.context import WorkerContext
from hpcft.training.data.prepare import load_split, load_tokenizer, prepare_all_ranks
from hpcft.training.distributed.rank_env import init_process_group
from hpcft.training.modes.finetune import make_trainer, score_split, training_arguments
from hpcft.training.modes.result import ModeResult
from hpcft.training.trainer.model import check_parameter_count, load_model


def evaluate(context: WorkerContext) -> ModeResult:
    """Scores the evaluation split without training."""
    recipe, plan, reporter = context.recipe, context.plan, context.reporter
    summary = prepare_all_ranks(context)
    tokenizer = load_tokenizer(context.paths)
    scored = load_split(context.paths, recipe.evaluation.split)
    assert scored is not None
    reporter.set(phase="model")
    init_process_group(plan)
    arguments = training_arguments(context, 1, has_validation=False)
    model = load_model(context, tokenizer)
    parameters = check_parameter_count(model, plan.facts)
    trainer = make_trainer(context, arguments, model, tokenizer, train=None, validation=None)
    reporter.set(phase="evaluation", step=0, total_steps=len(scored))
    metrics = score_split(trainer, scored, reporter, recipe.evaluation.split)
    reporter.set(phase="saving")
    return ModeResult(summary, parameters, metrics)

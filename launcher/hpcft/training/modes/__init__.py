"""Modes of a run: fine-tune, evaluate a finished model, or prompt a model with few shots."""

from __future__ import annotations

from hpcft.training.checkpointing.retention import remove_resume_checkpoints
from hpcft.training.context import WorkerContext


def run_mode(context: WorkerContext) -> None:
    """Runs the mode of the recipe; rank 0 writes the result."""
    # Imported here, because each mode imports libraries that the others do not need.
    match context.recipe.mode:
        case "finetune":
            from hpcft.training.modes.finetune import finetune as mode
        case "evaluate":
            from hpcft.training.modes.evaluate import evaluate as mode
        case "few_shot":
            from hpcft.training.modes.few_shot import prompt as mode
    from hpcft.training.modes.result import write_result

    result = mode(context)
    write_result(context, result)
    if context.rank.is_first:
        # A restart needs these checkpoints until the result is written.
        remove_resume_checkpoints(context.paths)
    context.reporter.set(phase="done")

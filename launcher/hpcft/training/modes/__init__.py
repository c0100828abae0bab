"""What a run does: fine-tune, evaluate, or few-shot prompting."""

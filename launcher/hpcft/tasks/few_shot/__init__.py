"""Few-shot prompting: the shots are computed once and shared by every query and every choice.

`requests` and `batches` say what to run, `prefix` runs what all prompts share, `attention` lets
many rows read it, `scorer` gives the likelihood of choices and `generation` writes answers.
"""

"""Prompts a model with few shots, computed once and shared by all queries and choices.

`requests` and `batching` say what is run, `prefix_cache` runs the tokens that all prompts begin
with, `cascade_attention` lets many rows read them, `scorer` computes the likelihood of choices and
`generation` writes answers. `task` is the task of a recipe.
"""

"""A training step of the real module, run on the meta device: shapes without data.

Imported lazily, by `memory.curves` when nothing is cached: these modules import torch.
"""

"""Traces the real module on the meta device: training steps, and batches of prompts.

These modules import torch, so that hpcft imports them only when a trace is not in the cache.
"""

"""Supervises the training process of a rank: restarts, hangs, memory."""

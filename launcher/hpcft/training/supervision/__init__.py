"""Supervises the worker of each rank: restarts, hangs, out-of-memory kills."""

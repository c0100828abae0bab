"""Writes, reshards and removes checkpoints."""

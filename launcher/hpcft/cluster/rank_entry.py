"""Kept for jobs queued by hpcft 0.1, whose pickles name `rank_entry.start`."""

from hpcft.training.entry import start

__all__ = ["start"]

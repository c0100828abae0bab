"""Prepares the data of a run and orders its batches."""

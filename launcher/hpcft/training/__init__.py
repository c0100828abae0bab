"""Runs on compute nodes: one process per GPU. Nothing below this package imports it."""

"""Errors, units, paths, files and records, which every other package uses."""

"""Core: errors, units, paths, files and records, which every package uses."""

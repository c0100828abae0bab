"""Reads data sets into checked examples."""

"""Reads data sets into examples."""

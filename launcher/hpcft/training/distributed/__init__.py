"""Starts the ranks of a job and connects them."""

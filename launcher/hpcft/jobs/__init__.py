"""Submits, resumes and watches runs, and collects their results."""

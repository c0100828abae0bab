"""Predicts the memory of a rank; every rule has its formula, unit and source."""

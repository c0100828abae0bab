"""Recovery: diagnoses why a run ended and decides how it continues."""

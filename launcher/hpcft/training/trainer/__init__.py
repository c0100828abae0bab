"""Extends the Hugging Face Trainer: checkpoints, retries, metrics, feature extraction."""

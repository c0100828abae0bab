"""The Hugging Face Trainer as hpcft runs it."""

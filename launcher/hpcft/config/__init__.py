"""Config: reads and checks recipes and cluster profiles."""

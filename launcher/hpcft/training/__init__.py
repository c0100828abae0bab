"""The compute-node half: one process per GPU. Nothing outside this folder imports it."""

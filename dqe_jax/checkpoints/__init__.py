"""Checkpoints of runs: saving, restoring, and a trained model opened for use."""

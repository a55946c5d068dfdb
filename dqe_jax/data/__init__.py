"""Data: TFDS builders, the schema they share, text, and the Grain pipeline."""

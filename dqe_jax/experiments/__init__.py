"""Comparisons: the ablation, the curve of bounds, and the audit of negatives."""

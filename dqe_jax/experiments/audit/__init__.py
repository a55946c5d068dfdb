"""The audit of negatives: how many of what a rule draws are in truth valid, and why."""

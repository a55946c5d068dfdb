"""The audit of negatives: how many of what a rule draws are truly relevant, and why."""

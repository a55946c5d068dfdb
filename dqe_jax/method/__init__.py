"""DQE-CIR itself: similarity, target-relative negative sampling, mining and losses."""

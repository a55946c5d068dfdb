"""Trains: the loop, the step, the optimiser, the bank of the gallery and the directory of a run."""

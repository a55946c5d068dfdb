"""Embeds images and queries over all devices: for evaluation, the bank and search."""

"""Configs: plain files to copy; each documents its run."""

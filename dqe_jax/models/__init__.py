"""The model and its backbones. `build.py` makes one from a config."""

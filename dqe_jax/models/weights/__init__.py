"""Pretrained weights: reading and writing safetensors in the layouts of others.

`source.py` finds and reads tensors, `rules.py` says which tensor is which parameter, `transfer.py`
applies the rules in both directions, `initial.py` gives a run the weights that its config names.
Nothing here ever unpickles a file.
"""

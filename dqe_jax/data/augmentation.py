"""Augmentation of training images: drawn by the loader, made on the devices.

What is drawn depends on the loader's generator alone, so that a run is the same on any devices. The
pixels are moved where they are needed: a mirrored view costs nothing, but to copy it into a batch
takes NumPy about half as long as decoding a JPEG, and a hundred times as long as a plain copy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias, TypeVar

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dqe_jax.method.arrays import Array

_Tree = TypeVar("_Tree")


@flax.struct.dataclass
class DrawnImage:
    """Images with what was drawn for each; `augmented` makes of them what the model takes.

    Attributes:
      image: uint8 `[*, H, W, 3]`, as they are.
      mirrored: bool `[*]`, whether they are mirrored left to right.
      corner: int32 `[*, 2]`, where the image begins, down and across, once it is mirrored and its
        border is repeated `reach_of(H)` times; None if it is not moved.
    """

    image: Array
    mirrored: Array
    corner: Array | None = None


Draw: TypeAlias = Callable[[np.ndarray, np.random.Generator], "np.ndarray | DrawnImage"]


def reach_of(side: int) -> int:
    """By how many pixels an image is moved at most: a sixteenth of its side."""
    return max(1, side // 16)


def keep(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The image as it is."""
    del rng
    return image


def flip(image: np.ndarray, rng: np.random.Generator) -> DrawnImage:
    """Mirrors `[H, W, 3]` left to right in half of the draws."""
    return DrawnImage(image, np.asarray(rng.random() < 0.5))


def flip_shift(image: np.ndarray, rng: np.random.Generator) -> DrawnImage:
    """`flip`, then moves the image by up to a sixteenth of its side, repeating the border."""
    mirrored = np.asarray(rng.random() < 0.5)
    corner = rng.integers(0, 2 * reach_of(image.shape[0]) + 1, 2)
    return DrawnImage(image, mirrored, corner.astype(np.int32))


AUGMENTATIONS: dict[str, Draw] = {"none": keep, "flip": flip, "flip_shift": flip_shift}


def augmented(drawn: DrawnImage) -> Array:
    """The augmented images, uint8 `[*, H, W, 3]`."""
    image = jnp.asarray(drawn.image)
    axes, one = image.shape[:-3], image.shape[-3:]
    image = image.reshape(-1, *one)
    image = jnp.where(drawn.mirrored.reshape(-1, 1, 1, 1), image[:, :, ::-1], image)
    if drawn.corner is not None:
        reach = reach_of(one[0])
        padded = jnp.pad(image, ((0, 0), (reach, reach), (reach, reach), (0, 0)), mode="edge")

        def window(whole: jax.Array, corner: jax.Array) -> jax.Array:
            return lax.dynamic_slice(whole, (corner[0], corner[1], 0), one)

        image = jax.vmap(window)(padded, drawn.corner.reshape(-1, 2))
    return image.reshape(*axes, *one)


def augment_all(tree: _Tree) -> _Tree:
    """A tree with `augmented` images in place of each `DrawnImage`, made where these lie."""

    def is_drawn(x: object) -> bool:
        return isinstance(x, DrawnImage)

    leaves, treedef = jax.tree.flatten(tree, is_leaf=is_drawn)
    drawn = [x for x in leaves if is_drawn(x)]
    if not drawn:
        return tree
    made = iter(_augmented_all(drawn))
    return jax.tree.unflatten(treedef, [next(made) if is_drawn(x) else x for x in leaves])


@jax.jit
def _augmented_all(drawn: list[DrawnImage]) -> list[Array]:
    return [augmented(each) for each in drawn]

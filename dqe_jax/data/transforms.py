"""Pure NumPy transforms of one example's texts and images."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np


def join_captions(captions: Sequence[str], order: str = "forward") -> str:
    """Captions of one modification as one text, as the FashionIQ papers join them: "a and b".

    Blanks, full stops, commas and question marks at the ends of captions go when several are
    joined, and empty captions are left out. Case stays: the tokenizers lower it.

    Args:
      captions: in their published order.
      order: "forward" or "reverse".
    """
    if len(captions) > 1:
        captions = [caption.strip(" .?,\t\n") for caption in captions]
    captions = [caption.strip() for caption in captions if caption.strip()]
    return " and ".join(captions if order == "forward" else captions[::-1])


def flip(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mirrors `[H, W, 3]` left to right in half of the draws."""
    return image[:, ::-1] if rng.random() < 0.5 else image


def shift(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Moves `[H, W, 3]` by up to a sixteenth of its side, repeating the border."""
    reach = max(1, image.shape[0] // 16)
    y, x = rng.integers(0, 2 * reach + 1, 2)
    padded = np.pad(image, ((reach, reach), (reach, reach), (0, 0)), mode="edge")
    return padded[y : y + image.shape[0], x : x + image.shape[1]]


def flip_shift(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """`flip`, then `shift`."""
    return shift(flip(image, rng), rng)


def keep(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The image as it is."""
    del rng
    return image


AUGMENTATIONS: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    "none": keep,
    "flip": flip,
    "flip_shift": flip_shift,
}

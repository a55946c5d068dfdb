"""A split whose images are described by attributes: their values, and the images as files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from dqe_jax.data.splits import Split
from dqe_jax.utils.errors import UserError


def described(
    attributes: Sequence[Sequence[str]], dataset: str
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Names of the attributes, and their values of each image.

    Args:
      attributes: of each image, as `splits.gallery_attributes` gives them.
      dataset: its name, for the error.

    Raises:
      UserError: images do not all have the same attributes.
    """
    every = [dict(one.partition("=")[::2] for one in own) for own in attributes]
    names = tuple(every[0]) if every else ()
    if not names or any(tuple(own) != names for own in every):
        raise UserError(
            f"the images of {dataset} do not all have the same attributes, as those of "
            "fashion_products and of triplets that are made from a table have: take such data."
        )
    return names, [tuple(own.values()) for own in every]


def write_images(split: Split, folder: Path) -> list[str]:
    """Writes the images of a gallery to a folder: their ids, by row.

    Raises:
      UserError: the folder holds something else, or cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        ids = [f"{row:06d}.png" for row in range(len(split.gallery))]
        strange = {path.name for path in folder.iterdir()} - set(ids)
        if strange:
            raise UserError(
                f"{folder} holds other files, such as {min(strange)}: name a new folder."
            )
        for row, id_ in enumerate(ids):
            if not (folder / id_).exists():
                Image.fromarray(split.gallery[row]).save(folder / id_)
    except OSError as error:
        raise UserError(
            f"cannot write to {folder} ({error.strerror or error}): name another folder."
        ) from error
    return ids

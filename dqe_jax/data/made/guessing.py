"""A table of attributes for images that have none: guessed by a zero-shot model that a user gives.

A file (TOML) names the attributes, their values, and the texts by which the model knows these:

    [colour]
    prompt = "a photo of a {value} product"
    values = ["red", "blue", "white"]

The model is a function of images and texts, as `Guess` says. For each attribute an image gets the
value whose text scores best. Where the lead over the second best is among the `unsure` smallest,
the attribute counts as not stated. The table can be read, and corrected, before it is used.
"""

from __future__ import annotations

import csv
import io
import os
import tomllib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from absl import logging
from etils import epath

from dqe_jax.data.made.folder import Folder, folder_of
from dqe_jax.data.made.photos import decode_all
from dqe_jax.data.made.tables import parse_attributes
from dqe_jax.data.raw_files import RawFiles
from dqe_jax.utils.errors import UserError, reason_of
from dqe_jax.utils.files import cannot_write, make_directory, read_text
from dqe_jax.utils.paths import whole_path
from dqe_jax.utils.progress import progress

# Scores [B, P] of images uint8 [B, H, W, 3] and P texts: the larger, the better a text fits.
Guess = Callable[[np.ndarray, Sequence[str]], np.ndarray]

FILE = "guessed.csv"
_BATCH = 32


def guess_table(
    images: str | os.PathLike[str],
    values: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    guess: Guess,
    image_size: int,
    preprocess: str = "pad",
    unsure: float = 0.2,
    overwrite: bool = False,
) -> tuple[epath.Path, tuple[str, ...]]:
    """Writes a table of guesses, unless it is there.

    Args:
      images: folder of the images.
      values: file as the module tells.
      output: directory for the table, `guessed.csv`.
      guess: the model.
      image_size: pixels a side of what the model sees.
      preprocess: how images become square, a name of `preprocess.PREPROCESS`.
      unsure: share of the images of which an attribute is not stated.
      overwrite: whether to guess again.

    Returns:
      Path of the table, and the names of the attributes.

    Raises:
      UserError: a file or what the model gives cannot be used.
    """
    asked = _read_values(values)
    place = whole_path(output)
    make_directory(place)
    path = place / FILE
    if path.exists() and not overwrite:
        logging.info("%s is used as it is; --overwrite guesses again.", path)
        return path, tuple(asked)
    files = RawFiles(folder_of(images))
    names, leads, chosen = _guesses(files, asked, guess, image_size, preprocess)
    if not names:
        raise UserError(f"--images: no image in {files.root} can be read; name another folder.")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", *asked])
    # An attribute's images with the smallest leads: of equal ones the first.
    places = np.argsort(np.argsort(leads, axis=0, kind="stable"), axis=0, kind="stable")
    for row, name in enumerate(names):
        cells = [
            "" if places[row, i] < unsure * len(names) else prompts[chosen[row, i]][0]
            for i, prompts in enumerate(asked.values())
        ]
        writer.writerow([name, *cells])
    try:
        path.write_text(text.getvalue(), encoding="utf-8")
    except OSError as error:
        raise cannot_write(place, error) from error
    logging.info("Guesses of %d images: %s. Look at some of them.", len(names), path)
    return path, tuple(asked)


def _guesses(
    files: RawFiles,
    asked: dict[str, list[tuple[str, str]]],
    guess: Guess,
    image_size: int,
    preprocess: str,
) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Names of the images, how far their best value leads `[N, A]`, and its number `[N, A]`."""
    names: list[str] = []
    leads, chosen = [], []
    for batch in _batches(files, image_size, preprocess):
        names += [name for name, _ in batch]
        pixels = np.stack([image for _, image in batch])
        columns = []
        for name, prompts in asked.items():
            columns.append(_scores(guess, pixels, [text for _, text in prompts], name))
        ordered = [np.sort(scores, axis=1) for scores in columns]
        leads.append(np.stack([x[:, -1] - x[:, -2] for x in ordered], axis=1))
        chosen.append(np.stack([scores.argmax(1) for scores in columns], axis=1))
    none = np.zeros((0, len(asked)))
    return names, np.concatenate([none, *leads]), np.concatenate([none, *chosen]).astype(int)


def _scores(guess: Guess, pixels: np.ndarray, texts: list[str], name: str) -> np.ndarray:
    try:
        scores = np.asarray(guess(pixels, texts), np.float64)
    except UserError:
        raise
    except Exception as error:  # of a user's own code
        raise UserError(
            f"--guess fails on {name} ({reason_of(error)}): see that it takes uint8 images "
            "[B, H, W, 3] and a list of texts."
        ) from error
    if scores.shape != (len(pixels), len(texts)) or not np.isfinite(scores).all():
        raise UserError(
            f"--guess gives {list(scores.shape)} for {len(pixels)} images and {len(texts)} texts "
            f"of {name}: return finite scores [{len(pixels)}, {len(texts)}]."
        )
    return scores


def _batches(
    files: RawFiles, image_size: int, preprocess: str
) -> Iterator[list[tuple[str, np.ndarray]]]:
    """The images that decode, with their paths, in batches."""
    batch: list[tuple[str, np.ndarray]] = []
    decoded = decode_all(Folder(files.root), files.image_paths, image_size, preprocess)
    decoded = progress(decoded, len(files.image_paths), "Images guessed")
    for name, photo in zip(files.image_paths, decoded):
        if photo.image is not None:
            batch.append((name, photo.image))
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _read_values(path: str | os.PathLike[str]) -> dict[str, list[tuple[str, str]]]:
    """By attribute, its values, each with the text by which the model knows it."""
    file = whole_path(path)
    try:
        content = tomllib.loads(read_text(file))
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{file} is not TOML ({error}); mend it.") from error
    asked = {}
    for name, own in content.items():
        parse_attributes([name])
        values = own.get("values") if isinstance(own, dict) else None
        sound = isinstance(values, list) and all(isinstance(v, str) and v for v in values)
        if not sound or len(set(values or ())) < 2:
            raise UserError(
                f"{file}: [{name}] must have values, a list of two different texts or more."
            )
        prompt = own.get("prompt", "a photo of {value}")
        if not isinstance(prompt, str) or "{value}" not in prompt:
            raise UserError(f"{file}: prompt of [{name}] must be a text with {{value}} in it.")
        asked[name] = [(value, prompt.replace("{value}", value)) for value in values or ()]
    if not asked:
        raise UserError(f"{file} names no attribute; add a section such as [colour].")
    return asked

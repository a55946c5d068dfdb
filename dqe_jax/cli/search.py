"""Searches an index for what fits an image and a text.

dqe-jax search --index=DIR --image=FILE "in red"

Prints a table. `--output=grid.png` or `--output=grid.html` writes the images that were found, and
`--open` shows them. The text is the argument that is no flag; without it, similar images are found.
`--image` may be given several times: the query is then of all these images. It may also be an id of
the index.
"""

from __future__ import annotations

import sys
import tempfile
import webbrowser
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags, logging

from dqe_jax.cli.command_line import given, pairs_of
from dqe_jax.utils.errors import UserError
from dqe_jax.utils.paths import on_disk

if TYPE_CHECKING:
    from dqe_jax.search.tables import Condition

_INDEX = flags.DEFINE_string("index", None, "Directory of the index.")
_MODEL = flags.DEFINE_string(
    "model", None, "Directory of the model, if it has moved since the index was made."
)
_IMAGE = flags.DEFINE_multi_string("image", None, "File of the reference image, or an id.")
_K = flags.DEFINE_integer("k", 10, "How many images.", 1)
_WEIGHTS = flags.DEFINE_multi_string(
    "weight", [], "NAME=FACTOR: multiplies the weight of an attribute, such as color=2."
)
_FILTER = flags.DEFINE_multi_string(
    "filter",
    [],
    "COLUMN=VALUE, COLUMN=VALUE|VALUE or COLUMN=LEAST..MOST: only images for which this holds.",
)
_EXCLUDE = flags.DEFINE_list("exclude", [], "Ids that must not be found.")
_OUTPUT = flags.DEFINE_string("output", None, "A .png or .html file for a grid of images.")
_OPEN = flags.DEFINE_bool("open", False, "Show the grid of images in the browser.")
REQUIRED = ("index", "image")
ARGUMENTS = 1


def main(argv: Sequence[str]) -> None:
    """Searches and prints what is found."""
    weights = {name: _factor(name, x) for name, x in pairs_of("weight", _WEIGHTS.value).items()}
    conditions = {name: _condition(x) for name, x in pairs_of("filter", _FILTER.value).items()}
    output = on_disk(_OUTPUT.value, "--output") if _OUTPUT.value is not None else None
    from dqe_jax.distributed import compiled  # importing JAX takes seconds
    from dqe_jax.search.index import open_index
    from dqe_jax.search.loading import load

    compiled.keep_programs()
    model = load(_MODEL.value) if _MODEL.value is not None else None
    index = open_index(given(_INDEX), model=model)
    images = given(_IMAGE)
    found = index.search(
        images[0] if len(images) == 1 else images,
        argv[1] if len(argv) > 1 else "",
        k=_K.value,
        weights=weights,
        exclude=_EXCLUDE.value,
        filter=conditions,
    )
    sys.stdout.write(f"{found!r}\n")
    if _OPEN.value and output is None:
        output = Path(tempfile.mkdtemp(prefix="dqe-search-"), "grid.html")
    if output is not None:
        file = found.save(output)
        logging.info("The images are in %s.", file)
        if _OPEN.value:
            webbrowser.open(file.absolute().as_uri())


def _factor(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"--weight={name}={text}: give a number, such as {name}=2.") from None


def _condition(text: str) -> Condition:
    """A value, several, or a range."""
    least, dots, most = text.partition("..")
    if dots:
        try:
            return (float(least) if least else None, float(most) if most else None)
        except ValueError:
            raise UserError(f"--filter: {text!r} is no range of numbers, such as 0..50.") from None
    return text.split("|") if "|" in text else text

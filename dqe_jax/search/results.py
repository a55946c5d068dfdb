"""What a search has found."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import overload

from dqe_jax.search import grid
from dqe_jax.utils.errors import UserError
from dqe_jax.utils.paths import on_disk
from dqe_jax.utils.text_table import text_table


@dataclasses.dataclass(frozen=True)
class Result:
    """An image that was found.

    Attributes:
      id: of the image: its path from the folder of the index.
      path: of its file.
      score: of the query with it, -1 to 1.
      probability: of being what was asked for, as fitted on the validation data of the run; None
        where none was fitted, and for an empty text.
      metadata: values of the index's columns; None where there is none.
    """

    id: str
    path: Path
    score: float
    probability: float | None
    metadata: Mapping[str, str | float | None]


@dataclasses.dataclass(frozen=True)
class Results(Sequence[Result]):
    """What a query has found, best first. In a notebook it shows itself as images.

    Attributes:
      text: of the query.
      references: names of its images.
      results: the images.
      attribute_weights: by name, as they were used.
      warnings: sentences about what the model does not understand of the query.
      thumbnails: gives JPEGs: of the references, and of the results.
    """

    text: str
    references: tuple[str, ...]
    results: tuple[Result, ...]
    attribute_weights: Mapping[str, float]
    warnings: tuple[str, ...]
    thumbnails: Callable[[], tuple[list[bytes], list[bytes]]] = dataclasses.field(repr=False)

    def __len__(self) -> int:
        return len(self.results)

    @overload
    def __getitem__(self, place: int) -> Result: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Result]: ...
    def __getitem__(self, place: int | slice) -> Result | Sequence[Result]:
        return self.results[place]

    @property
    def title(self) -> str:
        """The query in a line."""
        return f"{', '.join(self.references)}: {self.text!r}"

    @property
    def described_weights(self) -> str:
        """The attribute weights in a line; "" without any."""
        return ", ".join(f"{name} {x:.2f}" for name, x in self.attribute_weights.items())

    def __repr__(self) -> str:
        lines = [self.title]
        if self.described_weights:
            lines.append(f"attribute weights: {self.described_weights}")
        lines += [f"warning: {said}" for said in self.warnings]
        if not self.results:
            return "\n".join([*lines, "nothing is found"])
        columns = list(self.results[0].metadata)
        likely = any(one.probability is not None for one in self.results)
        rows = [["image", "score", *(["probability"] if likely else []), *columns]]
        for one in self.results:
            values = [_shown(one.metadata[name]) for name in columns]
            chance = [] if one.probability is None else [f"{one.probability:.0%}"]
            rows.append([one.id, f"{one.score:.3f}", *chance, *values])
        return "\n".join([*lines, text_table(rows)])

    def _repr_html_(self) -> str:
        return grid.to_html([self])

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the results as a grid of images: see `save_grid`."""
        return save_grid([self], path)


def save_grid(found: Sequence[Results], path: str | os.PathLike[str]) -> Path:
    """Writes what queries have found as a grid of images.

    Args:
      found: at least one.
      path: of a `.png` or `.html` file, which needs no other file.

    Raises:
      UserError: it has another suffix, is in a bucket, or cannot be written.
    """
    file = on_disk(path, "--output")
    try:
        if file.suffix.lower() in (".html", ".htm"):
            file.write_text(grid.to_page(found), encoding="utf-8")
        elif file.suffix.lower() == ".png":
            grid.to_picture(found).save(file)
        else:
            raise UserError(f"{file}: a grid of images is a .png or a .html file; name one.")
    except OSError as error:
        raise UserError(
            f"cannot write {file} ({error.strerror or error}): name a file in a writable directory."
        ) from error
    return file


def _shown(value: str | float | None) -> str:
    if value is None:
        return ""
    return f"{value:g}" if isinstance(value, float) else value

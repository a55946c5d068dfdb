"""The raw directory of `fashion_products`: its table and its photos."""

from __future__ import annotations

import dataclasses
import tarfile
from typing import IO

from etils import epath

from dqe_jax.data.builders.fashion_texts import ATTRIBUTES
from dqe_jax.data.made.grammar import NA
from dqe_jax.data.photos import MAX_BYTES
from dqe_jax.utils import errors
from dqe_jax.utils.files import is_regular

# Photos are decoded at the smallest JPEG scale of at least this many pixels a side, whatever the
# size asked for, so that which photos are identical does not depend on that size.
DECODE_SIDE = 512


@dataclasses.dataclass(frozen=True)
class Styles:
    """Rows of `styles.csv`, by column; and the ids of rows that were left out, by reason."""

    rows: list[dict[str, str]]
    duplicate_ids: list[str]
    incomplete_ids: list[str]


def read_styles(path: epath.Path) -> Styles:
    """Reads the attribute table, with any line ends.

    Returns:
        The rows with a distinct id, in order, empty values as `NA`.

    Raises:
        errors.UserError: A column that is needed is missing.
    """
    text = path.read_bytes().decode("utf-8", errors="replace")
    # Not the csv module: a product name that opens with a quote would swallow the rows after it.
    # `splitlines` would also split at characters that names may contain.
    lines = [line for line in text.removeprefix("\ufeff").split("\n") if line.strip()]
    header = [_clean(column) for column in lines[0].split(",")] if lines else []
    for column in ("id", *ATTRIBUTES):
        if column not in header:
            raise errors.UserError(
                f"{path} has no column {column!r}; it has {', '.join(header) or 'none'}, so give a "
                "directory with the published styles.csv by --data_dir."
            )
    rows: dict[str, dict[str, str]] = {}
    duplicates, incomplete = [], []
    for line in lines[1:]:
        fields = [_clean(field) for field in line.split(",", len(header) - 1)]
        row = dict(zip(header, fields))
        row_id = row.get("id", "")
        if len(fields) < len(header) or not row_id:
            incomplete.append(row_id)
        elif row_id in rows:
            duplicates.append(row_id)
        else:
            rows[row_id] = {column: value or NA for column, value in row.items()}
    return Styles(list(rows.values()), duplicates, incomplete)


def _clean(field: str) -> str:
    field = field.strip()
    if len(field) >= 2 and field[0] == field[-1] == '"':
        field = field[1:-1]
    return " ".join(field.split())


class Photos:
    """The photos of a raw directory, by id, from `images.tar` or the folder `images/`."""

    def __init__(self, raw_dir: epath.Path):
        """Lists the photos.

        Raises:
            errors.UserError: Neither form is there, or the archive is damaged.
        """
        self._tar = raw_dir / "images.tar"
        self._folder = raw_dir / "images"
        self._offsets: dict[str, int] | None = None
        self._file: IO[bytes] | None = None
        self.sizes: dict[str, int] = {}
        if self._tar.exists():
            self._offsets = {}
            try:
                if not is_regular(self._tar):
                    raise OSError("it is no regular file")
                # "r:" refuses compression, which has no random access.
                with self._tar.open("rb") as f, tarfile.open(fileobj=f, mode="r:") as tar:
                    for member in tar:
                        photo_id = _photo_id(member.name)
                        if member.isreg() and photo_id is not None:
                            self._offsets[photo_id] = member.offset_data
                            self.sizes[photo_id] = member.size
            except (tarfile.TarError, EOFError, OSError) as e:
                raise errors.UserError(
                    f"{self._tar} is not a complete uncompressed tar archive ({e}); copy it "
                    f"again, or unpack the photos to {self._folder}/ and remove it."
                ) from e
        elif self._folder.is_dir():
            for path in self._folder.iterdir():
                photo_id = _photo_id(path.name)
                if photo_id is not None and path.exists():  # a link may lead nowhere
                    self.sizes[photo_id] = path.stat().length
        else:
            raise errors.UserError(
                f"{raw_dir} has neither images.tar nor a folder images/; put the photos there as "
                "images/<id>.jpg, or give another directory by --data_dir."
            )

    def read(self, photo_id: str) -> bytes:
        """Bytes of a photo. Not thread-safe.

        Raises:
            ValueError: There is no such photo, or it is too large to be one.
        """
        if photo_id not in self.sizes:
            raise ValueError("is missing")
        if self.sizes[photo_id] > MAX_BYTES:
            raise ValueError(f"has {self.sizes[photo_id]} bytes")
        if self._offsets is None:
            path = self._folder / f"{photo_id}.jpg"
            if not is_regular(path):  # a pipe or a device would be read for ever
                raise ValueError("is no regular file")
            return path.read_bytes()
        if self._file is None:
            self._file = self._tar.open("rb")
        self._file.seek(self._offsets[photo_id])
        return self._file.read(self.sizes[photo_id])

    def close(self) -> None:
        """Closes the archive; a later read opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _photo_id(name: str) -> str | None:
    base = name.rsplit("/", 1)[-1]
    # Hidden files are the resource forks that some systems add to archives.
    if base.startswith(".") or not base.endswith(".jpg"):
        return None
    return base.removesuffix(".jpg")

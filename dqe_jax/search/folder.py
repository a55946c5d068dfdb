"""The images of a folder and of all folders in it, with what is no image named."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

from dqe_jax.data.raw_files import IMAGE_SUFFIXES
from dqe_jax.utils.errors import UserError
from dqe_jax.utils.paths import is_remote

# Images that people have and that no decoder here reads.
OTHER_SUFFIXES = (".avif", ".bmp", ".gif", ".heic", ".heif", ".jxl", ".tif", ".tiff")


@dataclasses.dataclass(frozen=True)
class File:
    """An image file.

    Attributes:
      id: its path from the folder, with forward slashes.
      size: in bytes.
      changed: when it was changed last, in nanoseconds.
    """

    id: str
    size: int
    changed: int


def folder_of(path: str | os.PathLike[str]) -> Path:
    """A folder of images as an absolute path.

    Raises:
      UserError: it is not there, or not on a disk of this machine.
    """
    if is_remote(path):
        raise UserError(f"the images in {path} cannot be indexed: copy them to this machine.")
    root = Path(path).expanduser().absolute()
    if not root.is_dir():
        raise UserError(f"there is no folder {root}: name one with images.")
    return root


def find_images(root: Path) -> tuple[list[File], dict[str, str]]:
    """The image files below a folder, in the order of their ids.

    Hidden files are passed over. Links to files within the folder count as files of their own;
    links that lead out of it, and links to folders, are not followed.

    Args:
      root: the folder, absolute.

    Returns:
      The files, and why others are left out, by their paths from the folder.
    """
    files: list[File] = []
    problems: dict[str, str] = {}
    real = os.path.realpath(root)
    for name, entry in _walk(root, "", problems):
        suffix = os.path.splitext(name)[1].lower()
        try:
            if entry.is_symlink() and entry.is_dir():
                problems[name] = "is a link to a folder, which is not followed"
            elif suffix in OTHER_SUFFIXES:
                problems[name] = "is no JPEG, PNG or WebP"
            elif suffix in IMAGE_SUFFIXES:
                if entry.is_symlink() and not _is_below(os.path.realpath(entry.path), real):
                    problems[name] = "is a link that leads out of the folder"
                    continue
                stat = entry.stat()
                files.append(File(name, stat.st_size, stat.st_mtime_ns))
        except OSError as error:  # of a link to nothing, or to itself
            if suffix in IMAGE_SUFFIXES:
                problems[name] = f"cannot be read ({error.strerror or error})"
    return sorted(files, key=lambda file: file.id), problems


def _walk(
    folder: Path | str, prefix: str, problems: dict[str, str]
) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """All that is no folder, and links to folders, with their paths from the root."""
    try:
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        problems[prefix or "."] = f"cannot be read ({error.strerror or error})"
        return
    for entry in entries:
        if entry.name.startswith("."):
            continue
        name = prefix + entry.name
        try:
            name.encode()
        except UnicodeEncodeError:
            problems[name.encode(errors="replace").decode()] = "has a name that is not UTF-8"
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(entry.path, name + "/", problems)
        else:
            yield name, entry


def _is_below(path: str, root: str) -> bool:
    return os.path.commonpath([path, root]) == root

"""The files of a raw directory as people have them: found by name, in whatever folders they lie."""

from __future__ import annotations

import collections
import os
from collections.abc import Iterable, Sequence

from etils import epath

from dqe_jax.utils.errors import UserError

_NAMED = 12  # files in a sentence
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


class RawFiles:
    """All files below a directory, listed once.

    Attributes:
      root: the directory.
    """

    def __init__(self, raw_dir: str | os.PathLike[str]):
        """Lists the files.

        Raises:
          UserError: the directory is not there.
        """
        self.root = epath.Path(raw_dir).expanduser()
        if not os.fspath(raw_dir) or not self.root.is_dir():
            raise UserError(
                f"--raw_dir: there is no directory {os.fspath(raw_dir)!r}; name the one that holds "
                "the annotations and images of the data set."
            )
        paths = sorted(_walk(self.root), key=_shallow_first)
        self._by_name: dict[str, list[str]] = {}
        self._by_stem: dict[str, list[str]] = {}
        self.image_paths: list[str] = []  # relative to the root, shallow ones first
        for path in paths:
            name = path.rsplit("/", 1)[-1]
            self._by_name.setdefault(name, []).append(path)
            stem, suffix = os.path.splitext(name)
            # Hidden files are the resource forks that some systems leave in archives.
            if suffix.lower() in IMAGE_SUFFIXES and not name.startswith("."):
                self._by_stem.setdefault(stem, []).append(path)
                self.image_paths.append(path)
        self._images = set(self.image_paths)

    def find(self, name: str, *, folder: str = "") -> epath.Path:
        """The file of this name; of several the one in `folder`, else the shallowest.

        Raises:
          UserError: there is none.
        """
        found = self._by_name.get(name, [])
        preferred = [path for path in found if path.split("/")[-2:-1] == [folder]]
        if not found:
            raise UserError(
                f"{self.root} lacks the file {name}; put it there or in a folder below."
            )
        return self.root / (preferred or found)[0]

    def require(self, names: Iterable[str]) -> None:
        """Checks that there is a file of each name.

        Raises:
          UserError: some are missing; it names them all.
        """
        missing = [name for name in dict.fromkeys(names) if not self.has(name)]
        if missing:
            files = "the file" if len(missing) == 1 else f"{len(missing)} files:"
            put = "put it" if len(missing) == 1 else "put them"
            more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
            raise UserError(
                f"{self.root} lacks {files} {', '.join(missing[:_NAMED])}{more}; {put} there or in "
                "a folder below."
            )

    def has(self, name: str) -> bool:
        """Whether a file of this name is there."""
        return name in self._by_name

    def image(self, name: str) -> str | None:
        """Path of an image relative to the root, or None.

        Args:
          name: a relative path; one that is relative to a folder below, if it fits one file; or a
            file name without its suffix. Of several files of one such name the shallowest is taken,
            then the first by name.
        """
        if name in self._images:
            return name
        if "/" in name:
            below = self._by_name.get(name.rsplit("/", 1)[-1], [])
            ends = [p for p in below if p.endswith(f"/{name}") and p in self._images]
            return ends[0] if len(ends) == 1 else None
        found = self._by_stem.get(name)
        return found[0] if found else None


class ImageNames:
    """Images by the names that a user may give them.

    A name is a path relative to the root (with or without `./`) or to a folder below it, so also a
    file's name alone, each with or without its suffix.

    Attributes:
      paths: of all images, relative to the root.
    """

    def __init__(self, paths: Iterable[str]):
        self.paths = frozenset(paths)
        self._by_name: dict[str, list[str]] = collections.defaultdict(list)
        for path in self.paths:
            parts = path.split("/")
            for start in range(len(parts)):
                name = "/".join(parts[start:])
                for each in (name, os.path.splitext(name)[0]):
                    self._by_name[each].append(path)

    def path(self, name: str) -> str:
        """The path of an image; the name itself, which is no path, if it is none or ambiguous."""
        name = name.removeprefix("./")
        found = self.found(name)
        return found[0] if name not in self.paths and len(found) == 1 else name

    def found(self, name: str) -> Sequence[str]:
        """The paths of all images that a name fits."""
        return [name] if name in self.paths else self._by_name.get(name, [])


def _walk(root: epath.Path) -> Iterable[str]:
    """Paths of all files below, relative, with forward slashes. Links to folders are followed.

    Raises:
      UserError: a folder cannot be read.
    """
    pending: list[tuple[epath.Path, str, frozenset[str]]] = [(root, "", frozenset())]
    while pending:
        folder, prefix, above = pending.pop()
        real = os.path.realpath(folder)
        if real in above:  # a link to a folder that it lies in
            continue
        for child in _children(folder):
            path = prefix + child.name
            # With many files it saves time not to ask of each image whether it is a folder.
            if not path.lower().endswith(IMAGE_SUFFIXES) and child.is_dir():
                pending.append((child, path + "/", above | {real}))
            else:
                yield path


def _children(folder: epath.Path) -> list[epath.Path]:
    try:
        return list(folder.iterdir())
    except OSError as error:
        raise UserError(
            f"{folder} cannot be read ({error.strerror or error}); make it readable or move it "
            "elsewhere."
        ) from error


def _shallow_first(path: str) -> tuple[int, str]:
    return path.count("/"), path

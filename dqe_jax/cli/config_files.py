"""Where a config that a user names lies: in the working directory, or in the package.

`shapes`, `shapes:smoke` and `configs/shapes.py:smoke` mean the file of that name in `configs/` of
the working directory, or else the one that comes with dqe_jax. A config that a user copied still
says `from configs import common`: `provide` makes that work from a wheel too.
"""

from __future__ import annotations

import runpy
import sys
import types
from pathlib import Path

from ml_collections import ConfigDict

import dqe_jax
from dqe_jax.utils.errors import UserError

FOLDER = "configs"


def own_folder() -> Path:
    """The configs that come with dqe_jax: inside the installed package, or beside it in a clone."""
    package = Path(dqe_jax.__file__).resolve().parent
    inside = package / FOLDER
    return inside if inside.is_dir() else package.parent / FOLDER


def known() -> list[str]:
    """Names of the configs that come with dqe_jax."""
    files = own_folder().glob("*.py")
    return sorted(f.stem for f in files if f.stem not in ("__init__", "common"))


def find(value: str) -> str:
    """The value of `--config` with a path that exists, where there is one.

    Args:
      value: a path or a name, perhaps with variants after a colon.

    Returns:
      The same with the path of the file; as it was if nothing is found.
    """
    path, colon, variants = value.partition(":")
    named = Path(path)
    if named.is_file():
        return value
    if named.suffix == "" and len(named.parts) == 1:
        named = Path(FOLDER, f"{path}.py")
    inside = named.parts[0] == FOLDER if named.parts else False
    candidates = [named, *([own_folder().joinpath(*named.parts[1:])] if inside else [])]
    for file in candidates:
        if file.is_file():
            return f"{file}{colon}{variants}"
    return value


def load_config(name: str) -> ConfigDict:
    """The config that `--config=NAME` gives. It is locked: a field that it lacks cannot be set.

    Args:
      name: a path or a name, perhaps with variants after a colon: "shapes:smoke".

    Raises:
      UserError: there is no such config.
    """
    provide()
    path, colon, variants = find(name).partition(":")
    if not Path(path).is_file():
        raise UserError(
            f"there is no config {path!r}: name a file, or one of {', '.join(known())}."
        )
    config = runpy.run_path(path)["get_config"](*([variants] if colon else []))
    return config.lock()


def provide() -> None:
    """Lets config files import one another as `configs.X`, the working directory's first."""
    package = sys.modules.get(FOLDER)
    if package is None:
        package = types.ModuleType(FOLDER)
        package.__path__ = []
        sys.modules[FOLDER] = package
    for folder in (Path.cwd() / FOLDER, own_folder()):
        if folder.is_dir() and str(folder) not in package.__path__:
            package.__path__.append(str(folder))

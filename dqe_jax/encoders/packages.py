"""The packages of the example encoders: which versions are installed, and what to do without."""

from __future__ import annotations

import importlib.metadata

from dqe_jax.utils.errors import UserError


def missing(package: str) -> UserError:
    """The error for a package of the extra that is not installed."""
    return UserError(
        f"The example encoders need the package {package}, which is not installed: run "
        "`pip install 'dqe_jax[example-encoders]'`."
    )


def versions_of(*packages: str) -> str:
    """Names and versions of installed packages: `torch 2.13.0, numpy 2.4.6`.

    Raises:
      UserError: one is not installed.
    """
    found = []
    for package in packages:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError as error:
            raise missing(package) from error
    return ", ".join(found)

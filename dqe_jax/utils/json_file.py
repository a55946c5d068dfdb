"""JSON files of results."""

from __future__ import annotations

import json
from typing import Any

from etils import epath

from dqe_jax.utils.errors import UserError


def write_json(path: epath.Path, content: Any, indent: int | None = 2) -> None:
    """Writes a JSON file and makes its directory.

    Raises:
      UserError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=indent) + "\n")
    except OSError as error:
        raise UserError(
            f"cannot write to {path.parent} ({error.strerror}): name a writable directory."
        ) from error

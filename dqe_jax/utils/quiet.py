"""Imports libraries that talk, without their advice."""

from __future__ import annotations

import os
from types import ModuleType


def import_transformers() -> ModuleType:
    """`transformers`, which would advise to install PyTorch: nothing here needs it."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # read when it is imported
    import transformers  # slow

    return transformers

"""DQE-CIR in JAX: composed image retrieval with attribute weights and target-relative negatives.

`dqe_jax.load(path)` opens a trained model for search, `dqe_jax.open_index(path)` an index.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dqe_jax.search.index import open_index
    from dqe_jax.search.loading import load

__version__ = "0.2.0"
__all__ = ("__version__", "load", "open_index")
# What is imported when it is asked for: JAX takes seconds.
_LATER = {"load": "dqe_jax.search.loading", "open_index": "dqe_jax.search.index"}


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(importlib.import_module(_LATER[name]), name)
    raise AttributeError(f"module 'dqe_jax' has no attribute {name!r}")

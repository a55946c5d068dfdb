"""Encoders that a config or a store names as `package.module:function`: of a user, or of ours.

An encoder of images takes uint8 `[B, H, W, 3]`, one of texts a list of B strings. It returns float
arrays `[B, D]` (one vector each) or `[B, P, D]` (tokens) by name, or one such array. Its module may
have a function `version()`, which tells apart what the code alone does not, such as the weights.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from dqe_jax.feature_store.shards import ARRAY_NAME
from dqe_jax.models.weights.sizes import GIVEN_DTYPES
from dqe_jax.utils.errors import UserError, reason_of
from dqe_jax.utils.files import JsonObject

ONE = "features"  # the name of an array that comes without one


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A function that makes features.

    Attributes:
      name: `package.module:function`.
      function: of images or texts.
      version: as its module says, "" if it does not.
      code: digest of the source of its module, "" if there is none.
    """

    name: str
    function: Callable[[Any], Any]
    version: str
    code: str

    @property
    def facts(self) -> JsonObject:
        """What its features depend on."""
        return {"encoder": self.name, "version": self.version, "code": self.code}

    def __call__(self, inputs: np.ndarray | list[str], what: str) -> dict[str, np.ndarray]:
        """Features of B images or texts: arrays `[B, D]` or `[B, P, D]` by name.

        Args:
          inputs: as the module says.
          what: is named in errors, such as "image 'a.jpg'".

        Raises:
          UserError: it fails, or gives something else.
        """
        try:
            made = self.function(inputs)
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"the encoder {self.name} fails on {what} ({reason_of(error)}): see that it takes "
                "uint8 images [B, H, W, 3], or a list of texts."
            ) from error
        arrays = made if isinstance(made, Mapping) else {ONE: made}
        found = {str(name): np.asarray(array) for name, array in arrays.items()}
        if not found:
            raise UserError(f"the encoder {self.name} gives no features: return arrays [B, D].")
        for name, array in found.items():
            if not ARRAY_NAME.fullmatch(name):
                raise UserError(
                    f"the encoder {self.name} calls an array {name!r}: take letters, digits and "
                    "'_', and not 'keys'."
                )
            if array.ndim not in (2, 3) or len(array) != len(inputs) or 0 in array.shape:
                raise UserError(
                    f"the encoder {self.name} gives {name!r} of shape {list(array.shape)} for "
                    f"{len(inputs)} inputs: return [{len(inputs)}, D] or [{len(inputs)}, P, D]."
                )
            if str(array.dtype) not in (*GIVEN_DTYPES, "float64"):
                raise UserError(
                    f"the encoder {self.name} gives {name!r} as {array.dtype}: return floats."
                )
        return found


def names_encoder(name: str) -> bool:
    """Whether a name in a config is that of an encoder, not of imported features."""
    return ":" in name


def open_encoder(name: str) -> Encoder:
    """The encoder of this name; imports its module, from the working directory too.

    Raises:
      UserError: there is no such function.
    """
    module_name, _, function_name = name.partition(":")
    if os.getcwd() not in map(os.path.abspath, sys.path):
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # of the module's own code
        raise UserError(
            f"the encoder {name!r} cannot be imported ({reason_of(error)}): name it as "
            "package.module:function, of a module that Python finds."
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UserError(f"the encoder {name!r}: {module_name} has no function {function_name!r}.")
    version = getattr(module, "version", None)
    try:
        said = str(version()) if callable(version) else ""
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"the encoder {name!r}: version() of {module_name} fails ({reason_of(error)}): it must "
            "give a text."
        ) from error
    return Encoder(name, function, said, _code_of(module))


def _code_of(module: Any) -> str:
    try:
        return hashlib.sha256(inspect.getsource(module).encode()).hexdigest()[:16]
    except (OSError, TypeError):
        return ""

"""Types of the signatures: arrays, whose shapes and dtypes are written as `jaxtyping` reads them.

`Float[Array, "B N"]` is an array of floats with two axes; axes of one name have one length.
The tests check them at run time (`dqe_jax/testing`); in use they are documentation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Shaped

Array = jax.Array | np.ndarray  # NumPy arrays are welcome wherever JAX arrays are

# A number, or a scalar of a compiled program.
Scalar = float | int | Shaped[Array, ""]

# Parameters of a model or of a part of it: names to arrays, or to such trees. So are gradients, and
# the shapes of parameters, with `jax.ShapeDtypeStruct` in place of arrays.
Params = Mapping[str, Any]

# A tree of arrays whose structure only its maker knows, such as the state of an optimiser.
Tree = Any

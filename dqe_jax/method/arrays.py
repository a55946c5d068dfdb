"""Array types of the signatures: shapes and dtypes are written as `jaxtyping` reads them.

`Float[Array, "B N"]` is an array of floats with two axes; axes of one name have one length.
The tests check them at run time (`dqe_jax/testing`); in use they are documentation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import numpy as np
from jaxtyping import Shaped

if TYPE_CHECKING:
    from jax import Array
else:
    Array = jax.Array | np.ndarray  # NumPy arrays are welcome wherever JAX arrays are

# A number, or a scalar of a compiled program.
Scalar = float | int | Shaped[Array, ""]

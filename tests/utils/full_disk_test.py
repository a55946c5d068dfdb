"""What says that a disk is full."""

from pathlib import Path

import numpy as np
import pytest

from dqe_jax.utils.files import is_of_disk


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_what_numpy_says_of_a_full_disk():
    """It has no number, and words of its own."""
    with (
        open("/dev/full", "wb", buffering=0) as file,
        pytest.raises(OSError, match="requested and 0 written") as told,
    ):
        np.zeros(2**20).tofile(file)
    assert told.value.errno is None
    assert is_of_disk(told.value)

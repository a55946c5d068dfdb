"""Libraries that talk, without their advice."""

import importlib.util
import os

import pytest

from dqe_jax.utils.quiet import skip_absent_tpu


@pytest.mark.parametrize(
    ("installed", "devices", "platforms", "wanted"),
    [
        (["libtpu"], [], None, "cpu"),
        (["libtpu"], ["accel0"], None, None),
        (["libtpu"], ["vfio/0"], None, None),
        (["libtpu"], ["vfio/vfio"], None, "cpu"),
        (["libtpu", "jax_plugins"], [], None, None),
        (["libtpu"], [], "tpu", "tpu"),
        ([], [], None, None),
    ],
)
def test_a_tpu_is_looked_for_unless_there_is_none(
    installed, devices, platforms, wanted, tmp_path, monkeypatch
):
    find = importlib.util.find_spec
    accelerators = ("libtpu", "jax_plugins", "jax_cuda12_plugin", "jax_cuda13_plugin")
    found = {name: object() if name in installed else None for name in accelerators}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: found[name] if name in found else find(name)
    )
    for device in devices:
        (tmp_path / device).parent.mkdir(exist_ok=True)
        (tmp_path / device).touch()
    environment = {"PATH": "x"} if platforms is None else {"JAX_PLATFORMS": platforms}
    monkeypatch.setattr(os, "environ", environment)
    skip_absent_tpu(tmp_path)
    assert environment.get("JAX_PLATFORMS") == wanted

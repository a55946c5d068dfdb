"""Libraries that talk, without their advice."""

import contextlib
import dataclasses
import importlib.util
import logging
import os

import orbax.checkpoint as ocp
import pytest

from dqe_jax.utils.quiet import skip_absent_tpu, without_old_news


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


class _Unwritten(ocp.AsyncCheckpointHandler):
    """A handler whose files are never written, as the other process is gone."""

    async def async_save(self, directory, args):
        return [self]

    def result(self, timeout=None):
        raise RuntimeError("the other process is gone")

    def save(self, directory, args):
        raise NotImplementedError

    def restore(self, directory, args=None):
        raise NotImplementedError


@ocp.args.register_with_handler(_Unwritten, for_save=True, for_restore=True)
@dataclasses.dataclass
class _Nothing(ocp.args.CheckpointArgs):
    pass


@pytest.mark.parametrize("quiet", [False, True])
def test_what_fails_while_orbax_writes_is_told_once(quiet, tmp_path, caplog):
    silence = without_old_news() if quiet else contextlib.nullcontext()
    with silence, caplog.at_level(logging.ERROR):
        checkpointer = ocp.AsyncCheckpointer(_Unwritten())
        checkpointer.save(tmp_path / "state", args=_Nothing())
        with pytest.raises(RuntimeError, match="the other process is gone"):
            checkpointer.wait_until_finished()
    assert ("Traceback" in caplog.text) != quiet

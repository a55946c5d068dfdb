"""A trained model, opened for use."""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING

import jax
from etils import epath
from tokenizers import Tokenizer

from dqe_jax.checkpoints import store
from dqe_jax.config import AnyConfig, RunConfig, differences
from dqe_jax.data import tokenizer as text_tokens
from dqe_jax.distributed import mesh
from dqe_jax.method.arrays import Params
from dqe_jax.models.dqe import DQE
from dqe_jax.models.setup import model_of, param_shapes
from dqe_jax.models.weights import sizes as size_files
from dqe_jax.utils.errors import UserError
from dqe_jax.utils.files import JsonObject

if TYPE_CHECKING:
    import orbax.checkpoint as ocp  # slow to import


@dataclasses.dataclass(frozen=True)
class Trained:
    """A checkpoint and the model it is of.

    Attributes:
      config: of the caller.
      trained_by: config of the run, as a nested dict.
      manager: of the run's checkpoints.
      step: of the checkpoint.
      model: as the config and the checkpoint say.
      tokenizer: of the checkpoint.
      devices: to run on.
      params: of the model, as NumPy arrays; with the moving average of those that trained, if the
        run kept one.
      averaged: whether it did.
      probability: of a score, fitted on validation data, as JSON; None without one.
      data: digests of the data that the run was trained on, by split; None if they are not known.
    """

    config: RunConfig
    trained_by: JsonObject
    manager: ocp.CheckpointManager
    step: int
    model: DQE
    tokenizer: Tokenizer
    devices: list[jax.Device]
    params: Params
    averaged: bool
    probability: JsonObject | None
    data: dict[str, str] | None

    @property
    def directory(self) -> epath.Path:
        """The directory of the checkpoints."""
        return self.manager.directory

    def place_params(self) -> Params:
        """The parameters, replicated over the devices."""
        return mesh.replicate(self.params, self.devices)


def open_trained(
    config: AnyConfig, directory: str | os.PathLike[str], step: int | None = None
) -> Trained:
    """Opens a checkpoint and reads its parameters.

    Args:
      config: must agree with that of the checkpoint in what the model depends on.
      directory: a workdir, or its `checkpoints` directory.
      step: of the checkpoint; None for the newest that is whole.

    Raises:
      UserError: the config is not allowed, there is no such checkpoint, or it is of another model.
    """
    config = RunConfig.of(config)
    manager = store.open_for_reading(directory)
    devices = mesh.devices_of(config.num_devices)
    return store.read_chosen(manager, step, lambda n: _open(config, manager, n, devices))[1]


def _open(
    config: RunConfig, manager: ocp.CheckpointManager, step: int, devices: list[jax.Device]
) -> Trained:
    """The checkpoint of a step; raises as `open_trained`."""
    meta = store.read_meta(manager, step)
    changed = differences(config, meta["config"], ("model",))
    if changed:
        raise UserError(
            f"the checkpoint in {manager.directory} is of another model; --config differs in "
            f"{'; '.join(changed)}."
        )
    with store.told_damaged(manager, step):
        words = text_tokens.tokenizer_from_json(meta["tokenizer"])
        sizes = meta["sizes"] and size_files.from_json(config.model.backbone, meta["sizes"])
        model = model_of(config.model, config.data, words, sizes)
    shapes = param_shapes(model, config.model, config.data)
    params = store.restore(manager, step, params=shapes)["params"]
    return Trained(
        config=config,
        trained_by=meta["config"],
        manager=manager,
        step=step,
        model=model,
        tokenizer=words,
        devices=devices,
        params=store.with_average(manager, step, meta, params),
        averaged=store.has_average(meta),
        probability=meta.get("probability"),
        data=meta.get("data"),
    )
